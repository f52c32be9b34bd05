"""The search loop, the evolutionary search, and what they return."""

from nasfx.searching.evolution import evolve as evolve
from nasfx.searching.loop import search as search
from nasfx.searching.pareto_front import Front as Front
from nasfx.searching.pareto_front import Point as Point
from nasfx.searching.pareto_front import pareto as pareto
from nasfx.searching.result import SearchResult as SearchResult
