"""For lm-eval's task files beside it: `!function utils.<task>` makes a task's samples, see
endprompt/evaluation/ruler.py.
"""

from functools import partial

from endprompt.evaluation import ruler
from endprompt.recipe import task_names

process_results = ruler.process_results
globals().update({task: partial(ruler.dataset, task) for task in task_names.RULER})
