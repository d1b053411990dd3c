"""Keys of recipes as they were called before: recipes and folders of earlier versions go on working."""

# Until November 2026 the options of all methods stood in the sections of every recipe.
FORMER = {
    "data": (
        "end_prompts prompt_loss_weight pose_chunks pose_text recall_share recall_cue recall_tokens"
        " match_pieces match_tokens"
    ).split(),
    "model": ["s2_group_size"],
}


def give_way(tree: dict, key: str) -> None:
    """Removes from ``tree``, in place, what would outweigh ``key``, a dotted key that is about to be
    overridden.

    An option is said by its former key, by itself in ``method_options``, or under a method's name there, and
    of these the later counts, as a resolved recipe needs; but what the command line says counts most.
    """
    section, _, option = key.partition(".")
    options = tree.get("method_options")
    former = option in FORMER.get(section, ())
    if not isinstance(options, dict) or not (former or section == "method_options"):
        return
    if former:
        options.pop(option, None)
    for own in options.values():
        if isinstance(own, dict):
            own.pop(option, None)


def taken(tree: dict) -> dict:
    """Takes the options of methods out of the sections of ``tree``, a recipe as it was read, and returns
    them; a method gets those that it has, as it did when every recipe named them all.
    """
    found: dict = {}
    for section, keys in FORMER.items():
        if isinstance(tree.get(section), dict):
            found |= {key: tree[section].pop(key) for key in keys if key in tree[section]}
    return found
