"""Scores predictions in files, without a model; ``python eval/score.py --help`` says how."""

from endprompt.evaluation.score import main

if __name__ == "__main__":
    main()
