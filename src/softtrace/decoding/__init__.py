"""Early exits that are proven, and lossless decoding with them."""

from softtrace.decoding.exit_checks import ProvenExit, check_cache, check_early_exit
from softtrace.decoding.recommend import recommend_exit
from softtrace.decoding.speculative import Generation, generate, greedy, speculate

__all__ = [
    "Generation",
    "ProvenExit",
    "check_cache",
    "check_early_exit",
    "generate",
    "greedy",
    "recommend_exit",
    "speculate",
]
