"""The supervised fine-tuning recipe: TRL reads it, masks what the user said, and the extended model keeps its
scaling.
"""

import json
import sys

import pytest
import yaml
from conftest import REPOSITORY
from training import run

from endprompt.bases.model import state_length, stated_lengths

RECIPE = REPOSITORY / "recipes/sft.yaml"
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the door code?"},
    {"role": "assistant", "content": "The door code is 40817."},
]


def test_every_key_is_trls_own():
    from dataclasses import fields

    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig

    known = {
        field.name
        for kind in (DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig)
        for field in fields(kind)
    }
    tree = yaml.safe_load(RECIPE.read_text())
    assert not set(tree) - known
    assert all((REPOSITORY / tree[key]).is_file() for key in ("deepspeed", "chat_template_path"))


def test_the_template_marks_what_the_assistant_says(tokenizer):
    tokenizer.chat_template = (REPOSITORY / "recipes/sft_template.jinja").read_text()
    row = tokenizer.apply_chat_template(
        CONVERSATION, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    said = [token for token, mask in zip(row["input_ids"], row["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(said).strip() == f"The door code is 40817.{tokenizer.eos_token}"
    assert row["input_ids"].count(tokenizer.bos_token_id) == 1
    asked = tokenizer.apply_chat_template(CONVERSATION[:2], tokenize=False, add_generation_prompt=True)
    assert asked == f"{tokenizer.bos_token}Be brief.\n\nUser: What is the door code?\nAssistant:"


def test_a_model_is_asked_as_it_was_tuned(tokenizer):
    """The tokens of the prompt begin those of the row: a space at its end would be one that no row has."""
    tokenizer.chat_template = (REPOSITORY / "recipes/sft_template.jinja").read_text()
    for start in (0, 1):  # with a system message and without
        row = tokenizer.apply_chat_template(CONVERSATION[start:], return_dict=True)["input_ids"]
        asked = tokenizer.apply_chat_template(
            CONVERSATION[start:-1], return_dict=True, add_generation_prompt=True
        )["input_ids"]
        assert len(asked) < len(row) and row[: len(asked)] == asked


def test_a_tokenizer_without_a_beginning(tokenizer):
    """As Qwen's."""
    tokenizer.chat_template = (REPOSITORY / "recipes/sft_template.jinja").read_text()
    tokenizer.bos_token = None
    for start in (0, 1):
        text = tokenizer.apply_chat_template(CONVERSATION[start:], tokenize=False)
        assert text.startswith("Be brief." if start == 0 else "User: ")


@pytest.mark.parametrize("role, place", [("tool", 2), ("system", 2), ("developer", 0)])
def test_a_message_that_has_no_place(tokenizer, role, place):
    tokenizer.chat_template = (REPOSITORY / "recipes/sft_template.jinja").read_text()
    messages = [*CONVERSATION[1:]]
    messages.insert(place, {"role": role, "content": "40817"})
    with pytest.raises(Exception, match=f"messages: '{role}' has no place there"):
        tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.slow
@pytest.mark.distributed
def test_an_extended_model_is_tuned_and_keeps_its_scaling(base, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    extended = tmp_path / "model"
    rope = {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}
    model = AutoModelForCausalLM.from_pretrained(base)
    model.config.rope_parameters, model.config.max_position_embeddings = rope, 2048
    tokenizer = AutoTokenizer.from_pretrained(base)
    state_length(model, tokenizer, 2048)
    model.save_pretrained(extended)
    tokenizer.save_pretrained(extended)
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text(
        "".join(json.dumps({"messages": CONVERSATION}) + "\n" for _ in range(16))
    )
    start = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node=1 -m trl.scripts.sft"
    folders = f"--config {RECIPE} --model_name_or_path {extended} --output_dir {tmp_path / 'sft'}"
    rows = f"--dataset_name {data} --dataset_train_split train --max_length 128"
    machine = "--bf16 false --use_cpu true --ddp_backend gloo --dtype float32"
    steps = "--max_steps 8 --logging_steps 1 --gradient_accumulation_steps 1 --learning_rate 5e-4"
    command = f"{start} {folders} {rows} {machine} {steps}".split()
    run(command)
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "sft")
    assert tuned.config.rope_parameters == rope and tuned.config.max_position_embeddings == 2048
    for folder in (
        tmp_path / "sft",
        next((tmp_path / "sft").glob("checkpoint-*")),
    ):  # rows are cut to max_length; what is saved still reads 2048
        assert set(stated_lengths(folder).values()) == {2048}
    history = json.loads(next((tmp_path / "sft").glob("checkpoint-*/trainer_state.json")).read_text())[
        "log_history"
    ]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 8 and losses[-1] < losses[0]
