"""What a training step costs: time, memory and MFU by method and target length, on one device, from a model's shape with random weights.

    python -m endprompt.eval.efficiency --shape small --methods endprompt full_length --targets 2048 4096 8192 --out FILE
    python -m endprompt.eval.efficiency --shape llama-3.2-1b --rows 1 2 4 --checkpointing none full --out FILE        # on a GPU
    python -m endprompt.eval.efficiency --picture FILE --out PICTURE

Every setting runs in a process of its own: rows of the method's own plan through the repository's collator, RoPE, loss and attention, AdamW in
float32 over the weights (on a GPU a bfloat16 copy of them computes, as under DeepSpeed: 16 bytes a parameter in all).  A step is data (rows to tensors on
the device), forward with the loss, backward, optimizer, each timed to its end; the figures are medians over the steps after warm-up.

MFU = tokens/s x ``flops_per_token`` / peak: 6 FLOPs a weight of every matrix product, attention counted causally (half of the square), nothing for recomputation.
Memory above the states: on a GPU, the allocator's peak less what lies there between two steps.  On a CPU, the bytes of what autograd keeps for the backward pass, without
parameters; no peak of anything else is known there.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from endprompt import BadInput, methods

# (layers, width, feed-forward width, heads, heads of keys and values, vocabulary, window, tied)
SHAPES = {
    "small": (4, 256, 688, 8, 4, 4096, 512, True),
    "smollm2-135m": (30, 576, 1536, 9, 3, 49152, 8192, True),
    "llama-3.2-1b": (16, 2048, 8192, 32, 8, 128256, 8192, True),
    "llama-3-8b": (32, 4096, 14336, 32, 8, 128256, 8192, False),
}
END_PROMPT_TOKENS = 12
RECALLED = 20  # tokens a span, a quarter of a row in all, as a recipe has it by default


def config_of(shape: str):
    from transformers import LlamaConfig

    layers, width, inner, heads, kv, vocabulary, window, tied = SHAPES[shape]
    return LlamaConfig(num_hidden_layers=layers, hidden_size=width, intermediate_size=inner, num_attention_heads=heads, num_key_value_heads=kv, vocab_size=vocabulary,
                       max_position_embeddings=window, tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})


def measure(shape: str, method_name: str, target: int, rows: int, checkpointing: str, steps: int, warm_up: int) -> dict:
    """One setting, in this process.  Returns seconds a step by part, tokens/s, MFU where the device's peak is known, and memory.

    Raises torch.OutOfMemoryError where it does not fit.
    """
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from endprompt import estimate, lora, loss, rope, s2
    from endprompt.collate import Collator
    from endprompt.trainer import PEAK_FLOPS, flops_per_token
    from endprompt.training_keys import Lora

    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    method, config = methods.get(method_name), config_of(shape)
    window = config.max_position_embeddings
    length = target if method.row_length == "target" else window
    kind = method.rope
    scaling = rope.scaling_for(kind, window, target, method.rope_share.get(kind, 1.0), method.whole_factor)
    theta = config.rope_parameters["rope_theta"]
    rope.apply(config, scaling, target)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    rope.verify(model.get_decoder().rotary_emb, model.config, scaling, theta)
    group = length // 4 if method.attention == "s2" else None
    if group:
        s2.install(model, group)
    loss.attach(model, uniform=not method.weighted)
    if method.lora:
        lora.inject(model, Lora.model_validate(method.lora), 0)
    model.train()
    if checkpointing == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    masters = [parameter.detach().float().requires_grad_() for parameter in parameters] if cuda else parameters
    optimizer = torch.optim.AdamW(masters, lr=1e-5, fused=cuda)
    collate = Collator(0, target)
    rng = np.random.default_rng(0)

    def batch():
        spans = np.full(length // 4 // RECALLED, RECALLED) if method.recall else []
        b = END_PROMPT_TOKENS if method.end_prompt else int(np.sum(spans))
        made = []
        for _ in range(rows):
            a = length - b
            positions = method.plan(np.array([a // 2, a - a // 2]) if method.chunked else a, spans if method.recall else b, target, rng)
            weights = np.ones(length, np.float32)
            weights[0], weights[a:] = 0, 0.1
            made.append({"input_ids": rng.integers(config.vocab_size, size=length), "position_ids": positions, "loss_weights": weights, "text_length": a, "prompt_length": b})
        found = {name: tensor.to(device) for name, tensor in collate(made).items() if name not in ("shift_prompt", "row_numbers")}
        return found, float(found["shift_weights"].sum())

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    parts: dict[str, list[float]] = {name: [] for name in ("data", "forward", "backward", "optimizer")}
    states = kept = peak = 0
    for step in range(warm_up + steps):
        if step == warm_up and cuda:
            states = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        at = [now()]
        inputs, divisor = batch()
        at.append(now())
        if not cuda and step == 0:
            with estimate.Kept(model) as counting:
                total = model(**inputs)["loss_sum"] / divisor
            kept = counting.bytes
        else:
            total = model(**inputs)["loss_sum"] / divisor
        at.append(now())
        total.backward()
        at.append(now())
        if cuda:
            for master, parameter in zip(masters, parameters, strict=True):
                master.grad = parameter.grad.float()
                parameter.grad = None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if cuda:
            with torch.no_grad():
                torch._foreach_copy_(parameters, masters)
        at.append(now())
        if step >= warm_up:
            for name, start, end in zip(parts, at, at[1:], strict=False):
                parts[name].append(end - start)
    if cuda:
        peak = torch.cuda.max_memory_allocated()
    seconds = statistics.median(map(sum, zip(*parts.values(), strict=True)))
    speed = rows * length / seconds
    flops = flops_per_token(config, group or length, bool(method.lora), not model.get_output_embeddings().weight.requires_grad)
    name = torch.cuda.get_device_name() if cuda else None
    limit = next((value for key, value in PEAK_FLOPS.items() if name and key in name), None)
    return {"row_length": length, "tokens": rows * length, "seconds": seconds, "parts": {part: statistics.median(values) for part, values in parts.items()},
            "tokens_per_second": speed, "flops_per_token": flops, "flops_per_second": speed * flops, "mfu": speed * flops / limit if limit else None,
            "trained_parameters": sum(parameter.numel() for parameter in parameters), "states_bytes": states if cuda else None, "peak_bytes": peak if cuda else None,
            "memory_above_states_bytes": peak - states if cuda else kept}


def run(settings: dict) -> dict:
    """``measure`` in a process of its own; {"fits": False} where memory runs out."""
    result = subprocess.run([sys.executable, "-m", "endprompt.eval.efficiency", "--worker", json.dumps(settings)], capture_output=True, text=True)
    if result.returncode == 0:
        return {"fits": True, **json.loads(result.stdout.splitlines()[-1])}
    if "OutOfMemoryError" in result.stderr or "can't allocate memory" in result.stderr or result.returncode == -9:
        return {"fits": False}
    raise BadInput(f"efficiency: {settings} failed: {(result.stderr.strip().splitlines() or ['no message'])[-1]}")


def best(entries: list[dict], method: str, target: int, checkpointing: str | None = None) -> dict | None:
    """The fastest of the settings of a method and target that fit, with one way of checkpointing or with any."""
    found = [entry for entry in entries if entry["fits"] and (entry["method"], entry["target"]) == (method, target) and checkpointing in (None, entry["checkpointing"])]
    return max(found, key=lambda entry: entry["tokens_per_second"], default=None)


def ratios(entries: list[dict]) -> dict:
    """endprompt against full_length at each target: tokens/s each at its best, memory above the states under the same checkpointing; and how flat endprompt is."""
    targets, found = sorted({entry["target"] for entry in entries}), {}
    for target in targets:
        one, other = best(entries, "endprompt", target), best(entries, "full_length", target)
        if one and other:
            found[str(target)] = {"speedup": one["tokens_per_second"] / other["tokens_per_second"], "arithmetic": other["flops_per_token"] / one["flops_per_token"]}
            for way in sorted({entry["checkpointing"] for entry in entries}):
                one, other = best(entries, "endprompt", target, way), best(entries, "full_length", target, way)
                if one and other:
                    one = min((entry for entry in entries if entry["fits"] and (entry["method"], entry["target"], entry["checkpointing"]) == ("endprompt", target, way)),
                              key=lambda entry: entry["rows"])
                    found[str(target)][f"memory_share_{way}"] = one["memory_above_states_bytes"] / other["memory_above_states_bytes"]
    flat = [entry for target in targets if (entry := best(entries, "endprompt", target))]
    if len(flat) > 1:
        found["endprompt_slowest_of_fastest_target"] = max(entry["seconds"] / entry["tokens"] for entry in flat) / min(entry["seconds"] / entry["tokens"] for entry in flat)
    return found


def draw(results: dict, path: Path) -> None:
    """The paper's two bars (Figure 4), time and memory, ours beside them, at the longest target that both endprompt and full_length were measured at."""
    from endprompt.eval import figures, paper

    entries = results["entries"]
    names = [name for name in methods.METHODS if any(entry["method"] == name and entry["fits"] for entry in entries)]
    shared = [target for target in sorted({entry["target"] for entry in entries}) if all(best(entries, name, target) for name in names)]
    if not shared:
        raise BadInput("--picture: no target length was measured for all methods that the file holds")
    target, printed = shared[-1], paper.tables()["figure_4_64k"].printed
    chosen = {name: best(entries, name, target) for name in names}
    hours = [1e9 / chosen[name]["tokens_per_second"] / 3600 for name in names]
    memory = [chosen[name]["memory_above_states_bytes"] / 2**30 for name in names]

    def of_paper(column: str) -> list[float | None]:
        return [float(printed[name][column]) if name in printed else None for name in names]

    paper_s = "paper (8B)"
    panels = [(f"time, target {target}", "hours for 1e9 tokens", names, {"ours": hours}),
              ("time, target 64K", "hours, 8 x A800", names, {paper_s: of_paper("hours")}),
              (f"memory above the states, target {target}", "GiB", names, {"ours": memory}),
              ("peak memory, target 64K", "GB a GPU", names, {paper_s: of_paper("memory_gb")})]
    figures.costs(panels, path, f"What training costs: shape {results['shape']} on {results['device'][:40]}, and the paper's Figure 4")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m endprompt.eval.efficiency", description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--methods", nargs="+", default=["endprompt", "full_length"])
    parser.add_argument("--targets", nargs="+", type=int, default=None, help="positions spanned; default: 2, 8 and 32 windows on a CPU, 16K, 64K, 256K and 1M on a GPU")
    parser.add_argument("--rows", nargs="+", type=int, default=[1], help="rows of the window's length a step; longer rows are taken one at a time")
    parser.add_argument("--checkpointing", nargs="+", choices=("none", "full"), default=["none"])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--picture", type=Path, default=None, help="draw this result file instead of measuring")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--worker", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(**json.loads(arguments.worker))))
        return
    try:
        if arguments.picture:
            draw(json.loads(arguments.picture.read_text()), arguments.out or arguments.picture.with_suffix(".png"))
            return
        for number in [*(arguments.targets or []), *arguments.rows, arguments.steps]:
            if number < 1:
                raise BadInput(f"efficiency: {number} is no number of positions, rows or steps; use 1 or more")
        _measure_all(arguments)
    except BadInput as error:
        print(f"endprompt: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (OSError, ValueError, KeyError) as error:
        print(f"endprompt: --picture {arguments.picture}: cannot be read: {error!r}", file=sys.stderr)
        raise SystemExit(2) from None


def _measure_all(arguments) -> None:
    import torch

    from endprompt import provenance, shards

    window = SHAPES[arguments.shape][6]
    targets = arguments.targets or ([2**14, 2**16, 2**18, 2**20] if torch.cuda.is_available() else [2 * window, 8 * window, 32 * window])
    entries = []
    for name in arguments.methods:
        method, failed = methods.get(name), set()
        if not method.trained:
            raise BadInput(f"--methods: {name} trains nothing")
        for target in targets:
            if target <= window:
                raise BadInput(f"--targets: {target} does not exceed the window of {window}")
            for way in arguments.checkpointing:
                for rows in arguments.rows if method.row_length == "physical" else [1]:
                    about = {"method": name, "target": target, "rows": rows, "checkpointing": way}
                    # What did not fit at a shorter row will not at a longer one.
                    setting = {"shape": arguments.shape, "method_name": name, "target": target, "rows": rows, "checkpointing": way}
                    found = {"fits": False} if way in failed else run({**setting, "steps": arguments.steps, "warm_up": arguments.warm_up})
                    if not found["fits"] and method.row_length == "target":
                        failed.add(way)
                    entries.append({**about, **found})
                    told = f"{found['tokens_per_second']:.0f} tokens/s, {found['memory_above_states_bytes'] / 2**20:.0f} MiB above the states" if found["fits"] else "does not fit"
                    print(f"{name:16} target {target:8} rows {rows} checkpointing {way}: {told}", file=sys.stderr, flush=True)
    result = {"shape": arguments.shape, "threads": os.environ.get("OMP_NUM_THREADS"), "entries": entries, "ratios": ratios(entries),
              "command": " ".join(["python -m endprompt.eval.efficiency", *sys.argv[1:]]), **provenance.stamp()}
    if arguments.out:
        shards.write_json(arguments.out, result)
    print(json.dumps(result["ratios"], indent=2))


if __name__ == "__main__":
    main()
