"""Judging models: perplexity, distance from a baseline, reports.

`evaluate` measures a model on a text under a named protocol. `write_report` turns
results into JSON, tables and plots. `qjax.evaluate.lm_eval` lets lm-evaluation-harness
run a model on its tasks.
"""

from qjax.evaluate.logits_file import LogitsFile as LogitsFile
from qjax.evaluate.perplexity import evaluate as evaluate
from qjax.evaluate.plots import plot_allocation as plot_allocation
from qjax.evaluate.plots import plot_layer_errors as plot_layer_errors
from qjax.evaluate.plots import plot_memory as plot_memory
from qjax.evaluate.plots import plot_tensor as plot_tensor
from qjax.evaluate.plots import require_matplotlib as require_matplotlib
from qjax.evaluate.report import markdown_table as markdown_table
from qjax.evaluate.report import report_evaluation as report_evaluation
from qjax.evaluate.report import write_report as write_report
from qjax.evaluate.scoring import Scorer as Scorer
from qjax.evaluate.scoring import TokenScores as TokenScores
from qjax.evaluate.scoring import as_scorer as as_scorer
from qjax.evaluate.scoring import score_windows as score_windows
from qjax.evaluate.statistics import summarize as summarize
from qjax.evaluate.tradeoff import plot_tradeoff as plot_tradeoff
from qjax.evaluate.weights import bits_per_weight as bits_per_weight
from qjax.evaluate.weights import compare_weights as compare_weights
from qjax.evaluate.weights import memory_by_component as memory_by_component
from qjax.evaluate.windows import PROTOCOLS as PROTOCOLS
from qjax.evaluate.windows import Windows as Windows
from qjax.evaluate.windows import plan_windows as plan_windows
