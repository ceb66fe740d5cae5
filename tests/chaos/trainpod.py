"""The shipped launcher of a training pod; its processes are those of chaos.rank.

CGD_TASK='{...}' CGD_CHAOS='{...}' python -m chaos.trainpod
"""

from cgd_stages.runtime import program
from cgd_stages.train import __main__ as train
from cgd_stages.train import launch

if __name__ == "__main__":
    launch.LOOP = "chaos.rank"
    program.run(train.main)
