"""The harness' hooks of LongBench; what they do stands in endprompt/evaluation/longbench.py."""

import functools

from endprompt.evaluation import longbench, longbench_scores

score = longbench.process_results
# task_qasper, task_repobench_p, ...: one function a task, for the harness passes no task name to a data
# function.
globals().update(
    {
        f"task_{name.replace('-', '_')}": functools.partial(longbench.dataset, name)
        for name in longbench_scores.TASKS
    }
)
