"""From text to blocks of tokens."""

from softtrace.data.blocks import pack
from softtrace.data.documents import read_documents, split_by_file

__all__ = ["pack", "read_documents", "split_by_file"]
