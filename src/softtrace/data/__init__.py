"""From text to blocks of tokens."""

from softtrace.data.blocks import even_places, evenly, pack, pack_with_labels
from softtrace.data.documents import (
    DEFAULT_EXCLUDE,
    DEFAULT_SUFFIXES,
    Document,
    held_out,
    read_documents,
    split_by_file,
    stream_documents,
    stream_held_out,
)
from softtrace.data.encoding import Tokens, beginning, encode, stream_counted, stream_tokens
from softtrace.data.text_source import TextSource

__all__ = [
    "DEFAULT_EXCLUDE",
    "DEFAULT_SUFFIXES",
    "Document",
    "TextSource",
    "Tokens",
    "beginning",
    "encode",
    "even_places",
    "evenly",
    "held_out",
    "pack",
    "pack_with_labels",
    "read_documents",
    "split_by_file",
    "stream_counted",
    "stream_documents",
    "stream_held_out",
    "stream_tokens",
]
