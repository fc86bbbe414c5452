"""Texts packed in every way that can be read."""

import bz2
import gzip
import io
import lzma
import zipfile


def zipped(*texts):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("folder/", b"")
        for number, text in enumerate(texts):
            archive.writestr(f"../../{number}", text)
    return buffer.getvalue()


PACK = {
    "": bytes,
    ".txt": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zip": zipped,
}
