"""The evaluation model and its generated world."""

from csp_ext.evaluation.checkpoint import load_eval_model
from csp_ext.evaluation.tasks import TASKS, Sample, make_samples

__all__ = ["TASKS", "Sample", "load_eval_model", "make_samples"]
