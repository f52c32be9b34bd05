"""The search loop, the evolutionary search, and what they return."""

from nasfx.searching.evolution import evolve as evolve
from nasfx.searching.loop import search as search
from nasfx.searching.result import SearchResult as SearchResult
