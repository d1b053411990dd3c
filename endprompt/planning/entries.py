"""Entries of a file of measured steps: a setting and what was found of it."""

SETTING = {
    "method": "endprompt",
    "target": None,
    "rows": 1,
    "checkpointing": "none",
    "kernels": "torch",
    "compiled": "no",
    "attention": "auto",
}


def key(entry: dict) -> tuple:
    return tuple(entry.get(name, default) for name, default in SETTING.items())


def best(entries: list[dict], method: str, target: int, checkpointing: str | None = None) -> dict | None:
    """The fastest of the settings of a method and target that fit, with one way of checkpointing or with
    any.
    """
    found = [
        entry
        for entry in entries
        if entry["fits"]
        and (entry["method"], entry["target"]) == (method, target)
        and checkpointing in (None, entry["checkpointing"])
    ]
    return max(found, key=lambda entry: entry["tokens_per_second"], default=None)


def ratios(entries: list[dict]) -> dict:
    """endprompt against full_length at each target: tokens/s each at its best, memory above the states under
    the same checkpointing and kernels; and how flat endprompt is from target to target, each at its best.
    """
    targets, found = sorted({entry["target"] for entry in entries}), {}
    for target in targets:
        one, other = best(entries, "endprompt", target), best(entries, "full_length", target)
        if one and other:
            found[str(target)] = {
                "speedup": one["tokens_per_second"] / other["tokens_per_second"],
                "arithmetic": other["flops_per_token"] / one["flops_per_token"],
            }
            for way in sorted({entry["checkpointing"] for entry in entries}):
                if other := best(entries, "full_length", target, way):
                    alike = [
                        entry
                        for entry in entries
                        if entry["fits"]
                        and key({**entry, "rows": 1}) == key({**other, "method": "endprompt", "rows": 1})
                    ]
                    if alike and other["memory_above_states_bytes"]:
                        least = min(alike, key=lambda entry: entry["rows"])
                        found[str(target)][f"memory_share_{way}"] = (
                            least["memory_above_states_bytes"] / other["memory_above_states_bytes"]
                        )
    flat = [entry for target in targets if (entry := best(entries, "endprompt", target))]
    if len(flat) > 1:
        found["endprompt_slowest_of_fastest_target"] = max(
            entry["seconds"] / entry["tokens"] for entry in flat
        ) / min(entry["seconds"] / entry["tokens"] for entry in flat)
    return found


def tell(entry: dict) -> str:
    """An entry in one line."""
    name = (
        f"{entry['method']:12} target {entry['target']:8} rows {entry['rows']} checkpointing"
        f" {entry['checkpointing']:4}"
    )
    options = "".join(
        f" {entry[option]}"
        for option in ("kernels", "compiled", "attention")
        if entry[option] != SETTING[option]
    )
    if not entry["fits"]:
        return f"{name}{options}: {entry.get('reason', 'does not fit')}"
    mfu = f", MFU {entry['mfu']:.1%}" if entry["mfu"] else ""
    memory = (
        f", {entry['memory_above_states_bytes'] / 2**20:.0f} MiB above the states"
        if entry["memory_above_states_bytes"]
        else ""
    )
    return f"{name}{options}: {entry['tokens_per_second']:.0f} tokens/s{mfu}{memory}"
