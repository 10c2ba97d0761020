"""Where raw text comes from: one class per format, not per data set.

A source is read in parts, which many processes can share. What is silently left out of a corpus is found when
the model is trained: what cannot be read is an error with its place, or counted and set aside.
"""

from megachat.data.sources.base import Part, Source
from megachat.data.sources.files import Files, JsonLines, Parquet, PlainText
from megachat.data.sources.hugging_face import HuggingFace
from megachat.data.sources.python_library import PythonLibrary
from megachat.data.sources.web import WebArchive
from megachat.data.sources.wikipedia import Wikipedia

__all__ = [
    "Files",
    "HuggingFace",
    "JsonLines",
    "Parquet",
    "Part",
    "PlainText",
    "PythonLibrary",
    "Source",
    "WebArchive",
    "Wikipedia",
]
