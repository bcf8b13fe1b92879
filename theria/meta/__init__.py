"""Learning to learn. How an inner solution is differentiated is a value; every algorithm takes any of them.

| values | |
|---|---|
| adjoints | `Unrolled`, `MixedMode`, `FirstOrder`, `Truncated`, `Implicit`, `Identity`, `Higher` |
| inner optimisers | `SGD`, `Adam`, `AdamW`, `RMSprop`, `Lion`; rates that are learned, or schedules |
| linear solvers | `theria.meta.solvers`: `CG`, `MINRES`, `GMRES`, ... |

| that algorithms are made of | |
|---|---|
| learners by steps | `MAML`, `FOMAML`, `ANIL`, `MetaSGD`, `MAMLPlusPlus`, `IMAML`, `Reptile`, `CAVIA` |
| with a classifier for each task | `ProtoMAML`, `UnicornMAML` |
| in closed form | `ProtoNet`, `R2D2` |
| implicit functions | `root`, `fixed_point`, `argmin`, `custom_root`, `custom_fixed_point`, `linear_solve` |
| bilevel problems | `BilevelProblem` with `ITD`, `AID`; `SOBA`, `SABA`, `F2SA`; `PES`, `TruncatedES` |

`certify` bounds the error of a hypergradient, `spot_check` compares any gradient with differences, `CapturedStep`
compiles an outer step and records it as one CUDA graph, and `processes` shares tasks among several processes.
"""

from theria.meta.adjoint import Adjoint, FirstOrder, Unrolled
from theria.meta.bilevel import AID, F2SA, ITD, SABA, SOBA, BilevelProblem
from theria.meta.capture import CapturedStep
from theria.meta.cavia import CAVIA, ExtraInputs, FiLM
from theria.meta.certificate import Certificate, SpotCheck, certify, spot_check
from theria.meta.distributed import Processes, processes
from theria.meta.evolution import PES, TruncatedES
from theria.meta.higher_engine import Higher
from theria.meta.imaml import IMAML
from theria.meta.implicit import argmin, custom_fixed_point, custom_root, fixed_point, linear_solve, root
from theria.meta.implicit_adjoint import Identity, Implicit
from theria.meta.learner import GradientLearner, Learner
from theria.meta.maml import ANIL, FOMAML, MAML, MetaSGD
from theria.meta.maml_plus_plus import MAMLPlusPlus
from theria.meta.mixed_mode import MixedMode
from theria.meta.optimisers import SGD, Adam, AdamW, Cosine, Exponential, InnerOptimiser, Lion, RMSprop, Schedule
from theria.meta.proto_maml import ProtoMAML
from theria.meta.protonet import ProtoNet
from theria.meta.r2d2 import R2D2
from theria.meta.reptile import Reptile
from theria.meta.task_head import TaskHeadLearner
from theria.meta.truncated import Truncated
from theria.meta.unicorn_maml import UnicornMAML

__all__ = [
    "AID",
    "ANIL",
    "CAVIA",
    "F2SA",
    "FOMAML",
    "IMAML",
    "ITD",
    "MAML",
    "PES",
    "R2D2",
    "SABA",
    "SGD",
    "SOBA",
    "Adam",
    "AdamW",
    "Adjoint",
    "BilevelProblem",
    "CapturedStep",
    "Certificate",
    "Cosine",
    "Exponential",
    "ExtraInputs",
    "FiLM",
    "FirstOrder",
    "GradientLearner",
    "Higher",
    "Identity",
    "Implicit",
    "InnerOptimiser",
    "Learner",
    "Lion",
    "MAMLPlusPlus",
    "MetaSGD",
    "MixedMode",
    "Processes",
    "ProtoMAML",
    "ProtoNet",
    "RMSprop",
    "Reptile",
    "Schedule",
    "SpotCheck",
    "TaskHeadLearner",
    "Truncated",
    "TruncatedES",
    "UnicornMAML",
    "Unrolled",
    "argmin",
    "certify",
    "custom_fixed_point",
    "custom_root",
    "fixed_point",
    "linear_solve",
    "processes",
    "root",
    "spot_check",
]
