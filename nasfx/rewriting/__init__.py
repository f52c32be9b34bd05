"""The pass engine: graphs over a module tree, passes, pipelines, verification and printing.

It knows nothing of architecture search: choices, gates and strategies are built on it.
"""

from nasfx.rewriting.graph import ModelGraph as ModelGraph
from nasfx.rewriting.graph import Provenance as Provenance
from nasfx.rewriting.graph import graphs as graphs
from nasfx.rewriting.graph import provenance as provenance
from nasfx.rewriting.graph import set_provenance as set_provenance
from nasfx.rewriting.passes import Exactness as Exactness
from nasfx.rewriting.passes import Pass as Pass
from nasfx.rewriting.passes import PassContext as PassContext
from nasfx.rewriting.pipeline import History as History
from nasfx.rewriting.pipeline import Pipeline as Pipeline
from nasfx.rewriting.printing import format_graph as format_graph
from nasfx.rewriting.verifier import ANY as ANY
from nasfx.rewriting.verifier import Stage as Stage
from nasfx.rewriting.verifier import verify as verify
