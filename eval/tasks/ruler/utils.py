"""For lm-eval's task files beside it: `!function utils.<task>` makes a task's samples, see
endprompt/eval/ruler.py.
"""

from functools import partial

from endprompt.eval import names, ruler

process_results = ruler.process_results
globals().update({task: partial(ruler.dataset, task) for task in names.RULER})
