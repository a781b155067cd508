"""What a file is that is not what its name says: told from its first bytes, for messages."""

from __future__ import annotations

HEAD_BYTES = 512
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}
COMPRESSED_SUFFIXES = (".gz", ".tgz", ".bz2", ".tbz", ".tbz2", ".xz", ".txz", ".zst", ".lz4", ".zip", ".rar", ".7z")


def told_by_head(head: bytes) -> str | None:
    """What the file is and what to do, to follow its name; None when nothing is known of it."""
    for magic, (name, command) in _COMPRESSED.items():
        if head.startswith(magic):
            return f"is compressed with {name}, and pieces of it cannot be read in place; unpack it first ({command})"
    if head.startswith(b"PK\x03\x04"):
        return "is a zip file; unpack it first (unzip)"
    if head.startswith(b"PAR1"):
        return "is a parquet file; --source hf-parquet reads those"
    if head[257:262] == b"ustar":
        return "is a tar; --source webdataset reads those"
    if head.startswith(b"version https://git-lfs"):
        return "is Git LFS's note of where the file lies, not the file; fetch it first (git lfs pull)"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        return "is a web page; is a login needed, or the address wrong? download it again"
    if text.startswith((b"{", b"[")):
        return "is JSON text, such as a server's refusal; download it again"
    if head and not head.strip(b"\0"):
        return "holds nothing but zeros; its download was not finished, copy or download it again"
    return None
