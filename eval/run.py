"""Scores one model on the recipe's tasks; one JSON file a task and length, skipped where it exists for the same question."""

import hashlib
import json
import sys
from pathlib import Path

import torch

from endprompt import BadInput, corpus, model, provenance, shards
from endprompt.config import Recipe
from endprompt.eval import figures, passkey, perplexity
from endprompt.methods import Method


def fingerprint(folder: Path) -> str:
    """Identity of a saved model: SHA-256 over name, size, first and last MiB of its config and of every file of weights."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.name == "config.json" or path.suffix in (".safetensors", ".gguf", ".bin")):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}".encode() + file.read(2**20))
            file.seek(max(0, path.stat().st_size - 2**20))
            digest.update(file.read(2**20))
    return digest.hexdigest()


def load(recipe: Recipe, method: Method, run: Path, other: str | None):
    """(model, tokenizer, what identifies the model).  Raises BadInput if there is no model to score."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    if other is None and not method.trained:
        network = model.build(recipe, method, dtype, cuda)
        tokenizer = model.load_tokenizer(recipe)
        folder = Path(model.locate(recipe)["pretrained_model_name_or_path"])
        identity = {"name_or_path": recipe.model.name_or_path, "revision": recipe.model.revision, "gguf_file": recipe.model.gguf_file,
                    "rope_parameters": network.config.rope_parameters, "fingerprint": fingerprint(folder) if folder.is_dir() else None}
    else:
        folder = Path(other).expanduser() if other else run / "model"
        if not folder.is_dir() and (other is None or other.startswith((".", "/", "~"))):
            raise BadInput(f"--model: there is no folder {folder}" if other else f"{folder} is missing; train {method.name} first, or name a model with --model")
        source = folder if folder.is_dir() else other  # else an id of the hub
        try:
            network, information = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, attn_implementation=model.attention_implementation(recipe, cuda), output_loading_info=True)
            tokenizer = AutoTokenizer.from_pretrained(source)
        except model.UNREADABLE as error:
            raise BadInput(f"--model: {source} cannot be loaded: {(str(error).strip() or type(error).__name__).splitlines()[0]}") from None
        if information["missing_keys"]:
            raise BadInput(f"--model: {source} lacks {sorted(information['missing_keys'])[:5]}; random values would be scored in their place")
        identity = {"name_or_path": str(folder), "fingerprint": fingerprint(folder) if folder.is_dir() else None}
    # Prompts are longer than what some tokenizers were told to expect; the window is what is being tested.
    tokenizer.model_max_length = sys.maxsize
    identity |= {"dtype": str(network.dtype), "attention": network.config._attn_implementation}
    return network.eval().to("cuda" if cuda else "cpu"), tokenizer, identity


def held_out(recipe: Recipe, tokenizer, longest: int) -> list[list[int]]:
    """The token ids of as many held-out documents as the perplexity of windows up to ``longest`` tokens needs, in order."""
    value, found, scored = recipe.eval.perplexity_corpus, [], 0
    reader = recipe.model_copy(update={"data": recipe.data.model_copy(update={"corpus": value})})
    try:
        files = corpus.local_files(reader)
        for _, text in corpus.documents(reader, files):
            ids = tokenizer(text)["input_ids"]
            if len(ids) >= longest:
                found.append(ids)
                scored += ((len(ids) - longest) // recipe.eval.perplexity_stride + 1) * recipe.eval.perplexity_stride
            if scored >= recipe.eval.perplexity_tokens:
                break
        return found
    except BadInput as error:
        raise BadInput(str(error).replace("data.corpus", "eval.perplexity_corpus")) from None


def evaluate(recipe: Recipe, method: Method, run: Path, other: str | None = None) -> None:
    """Writes ``run``/eval/<task>/<length>.json (``run``/eval-<name>-<hash of its path> for another model) and a picture, and prints
    a line a score.

    Raises BadInput if there is no model, a length is too short for its task, or the held-out documents are shorter than a length.
    """
    options, folder = recipe.eval, run / "eval"
    if other is not None:
        path = Path(other).expanduser().resolve()
        folder = run / f"eval-{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    network, tokenizer, identity = load(recipe, method, run, other)
    longest = max(options.lengths)
    documents = held_out(recipe, tokenizer, longest) if "perplexity" in options.tasks else []
    for task in options.tasks:
        for length in sorted(options.lengths):
            question = {"task": task, "length": length, "model": identity, "seed": options.seed}
            if task == "passkey":
                question |= {"samples": options.samples, "depths": options.depths}
            else:
                question |= {"corpus": options.perplexity_corpus, "stride": options.perplexity_stride, "scored_tokens": options.perplexity_tokens, "longest": longest}
            path = folder / task / f"{length}.json"
            result = _existing(path, question)
            if result is None:
                try:
                    if task == "passkey":
                        scores = passkey.score(network, tokenizer, length, options.depths, options.samples, options.seed)
                    else:
                        scores = perplexity.score(network, documents, length, longest, options.perplexity_stride, options.perplexity_tokens)
                except ValueError as error:
                    raise BadInput(f"eval.lengths: {task} at {length}: {error}") from None
                result = {"question": question, "recipe": recipe.name, "method": method.name, "scores": scores, **provenance.stamp()}
                path.parent.mkdir(parents=True, exist_ok=True)
                shards.write_json(path, result)
            scores = result["scores"]
            shown = f"{scores['accuracy']:6.1%}" if task == "passkey" else f"{scores['perplexity']:8.3f}"
            low, high = (f"{scores[end]:.1%}" if task == "passkey" else f"{scores[end]:.3f}" for end in ("low", "high"))
            print(f"{method.name:14} {task:10} {length:>7} {shown}  [{low}, {high}]", flush=True)
    if "passkey" in options.tasks:
        figures.heatmaps({method.name: figures.read(folder / "passkey")}, folder / "passkey.png")


def _existing(path: Path, question: dict) -> dict | None:
    """A result already there for the very same question; None, after saying so, if there is one for another."""
    try:
        result = json.loads(path.read_text())
        if result["question"] == json.loads(json.dumps(question)):
            return result
        print(f"{path}: was scored for another model or setting; scoring again", file=sys.stderr)
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError):
        print(f"{path}: cannot be read; scoring again", file=sys.stderr)
    return None
