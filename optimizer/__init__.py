"""What to try, which points win, which one to deploy, and when to do it again."""

from .front import Evaluation, Front, pareto
from .pick import NothingFeasible, make_spec, pick
from .search import tune
from .space import SearchSpace, default_space, load_space
from .store import Ledger, LedgerError
from .study import Interrupted, Study, load_study

__all__ = [
    "Evaluation",
    "Front",
    "Interrupted",
    "Ledger",
    "LedgerError",
    "NothingFeasible",
    "SearchSpace",
    "Study",
    "default_space",
    "load_space",
    "load_study",
    "make_spec",
    "pareto",
    "pick",
    "tune",
]
