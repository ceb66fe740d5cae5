"""The contract between the operator and the stage programs: a task goes in, progress and last words come out.

This is the one package that both worlds import, so it needs pydantic and nothing else. The operator passes a
`StageTask` as JSON in the environment variable `CGD_TASK`; unknown fields are refused on both sides, so that an
operator and an image of different versions fail loudly and at once.

A part that a manifest and a task share is one class here, with the bounds and the descriptions of the manifest's
fields. `cgd_operator.api` extends it by the fields that only a manifest has. Import every name from here.
"""

from cgd_stages.contract.base import *
from cgd_stages.contract.methods import *
from cgd_stages.contract.models import *
from cgd_stages.contract.pod import *
from cgd_stages.contract.sources import *
from cgd_stages.contract.task import *
from cgd_stages.contract.training import *
