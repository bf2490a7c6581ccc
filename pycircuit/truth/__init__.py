"""Worth of graphs: effects predicted and measured, circuits alone and removed, beside baselines, over many prompts."""

from .behaviours import Behaviour, Candidate, Question, behaviours
from .truth_figure import figure
from .truth_page import section
from .truth_run import TruthRun

__all__ = ["Behaviour", "Candidate", "Question", "TruthRun", "behaviours", "figure", "section"]
