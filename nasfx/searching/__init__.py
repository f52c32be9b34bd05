"""The search loop and its result."""

from nasfx.searching.loop import search as search
from nasfx.searching.result import SearchResult as SearchResult
