"""For test_resume.py: python stop_in_evaluation.py RANK NUMBER FLAGS... is main.py FLAGS, where the process RANK gets
SIGTERM as its evaluation NUMBER, from 1 on, begins."""
import os
import signal
import sys

import main
from runtime.machine.processes import environment_rank

if __name__ == "__main__":
    rank, number = (int(word) for word in sys.argv[1:3])
    inner, begun = main.evaluate, []

    def evaluate(*args, **kwargs):
        begun.append(1)
        if len(begun) == number and environment_rank() == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(*args, **kwargs)

    main.evaluate = evaluate
    main.main(sys.argv[3:])
