"""From text to blocks of tokens."""

from softtrace.data.documents import pack, read_documents, split_by_file

__all__ = ["pack", "read_documents", "split_by_file"]
