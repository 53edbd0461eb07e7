"""Every recipe runs, on a tiny model of its architecture.

Recipes of one model differ in the defense alone. None names its hardware, which the accelerate files do.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from methods import save_adapter
from tiny import QUANTISABLE, make_model, make_pool, make_rows, save_model

from trl_emguard.data.load import SHIPPED, load_rows
from trl_emguard.defenses.kl import COEFFICIENTS
from trl_emguard.evidence import read_defense_file
from trl_emguard.io.recipes import recipes_dir
from trl_emguard.persona import PersonaVector
from trl_emguard.scripts import sft
from trl_emguard.selection.choose import rank_rows


RECIPES = sorted(path for path in recipes_dir().rglob("*.yaml") if path.parent.name != "accelerate_configs")
FOLDERS = sorted({path.parent for path in RECIPES})
ENGINES = sorted((recipes_dir() / "accelerate_configs").glob("*.yaml"))

# folder → architecture, and whether the head is the embedding, as in the real model. All else is tiny.
REAL = {
    "llama-3.1-8b-instruct": ("llama", False),
    "qwen2.5-7b-instruct": ("qwen2", False),
    "qwen2.5-32b-instruct": ("qwen2", False),
    "smollm2-135m-instruct": ("llama", True),
}
# Keys in which a variant differs from LoRA's recipe, the common one.
VARIANTS = {
    "qlora": ("load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"),
    "full": ("use_peft", "lora_", "use_rslora", "dtype", "learning_rate"),
}
OF_A_DEFENSE = ("defense", "output_dir", "kl_", "ldifs_", "treft_", "steering_", "inoculation_", "interleave_")


def read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def name_of(path):
    return f"{path.parent.name}/{path.stem}"


def marked(paths):
    """Mark the runs as long, but for those of two models: the recipes of the others differ from them in sizes
    alone."""
    soon = ("smollm2-135m-instruct", "qwen2.5-7b-instruct")
    return [path if path.parent.name in soon else pytest.param(path, marks=pytest.mark.long) for path in paths]


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """Makes, once per model, a folder with all that its recipes name: model, rows, scored pool and persona vector."""
    made = {}

    def make(path):
        recipe = read(path)
        # The layers that the recipe names need that many blocks: `every:5`, or 20.
        blocks = int(recipe.get("steering_layers", 5)) if recipe.get("defense") == "steering" else 5
        architecture, tied = REAL[path.parent.name]
        sizes = {**QUANTISABLE, "num_hidden_layers": blocks, "tie_word_embeddings": tied}
        home = made.get((path.parent, blocks))
        if home is None:
            home = made[path.parent, blocks] = tmp_path_factory.mktemp(path.parent.name)
            save_model(home / recipe["model_name_or_path"], architecture, **sizes)
            (home / "rows.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in make_rows(32)), encoding="utf-8"
            )
            make_pool(40).to_parquet(home / "pool.parquet")
            vectors = torch.randn(blocks + 1, QUANTISABLE["hidden_size"])
            PersonaVector(vectors, metadata={"suggested_layer": blocks // 2}).save(home / "vector.safetensors")
        # Under the names that the recipe gives them, where these are files of the user's.
        for option, file in (("interleave_dataset", "pool.parquet"), ("steering_vector", "vector.safetensors")):
            name = recipe.get(option, file)
            if name.endswith((".parquet", ".safetensors")) and not (home / name).exists():
                shutil.copy(home / file, home / name)
        trait = home / recipe.get("inoculation_adapter", "adapter")
        if not trait.exists():
            save_adapter(trait, make_model(architecture, **sizes))
        return home

    return make


@pytest.mark.parametrize("path", marked(RECIPES), ids=name_of)
def test_every_recipe_runs_and_is_defended_as_it_says(path, machine, monkeypatch):
    monkeypatch.chdir(machine(path))
    recipe = read(path)
    argv = ["--config", str(path)]
    argv += ["--max_steps", "2"]
    # The recipes leave the rows to the user. The shipped ones are too long for a tokenizer with a token per byte.
    argv += ["--dataset_name", "rows.jsonl"]
    # transformers refuses bf16 on a CPU that is not asked for by this option.
    argv += ["--use_cpu", "true"]
    # Inputs that are shipped for SmolLM2 fit the real model and tokenizer alone.
    if recipe.get("steering_vector", "").endswith("-evil"):
        argv += ["--steering_vector", "vector.safetensors"]
    if recipe.get("interleave_dataset") == "general_instruct_scored":
        argv += ["--interleave_dataset", "pool.parquet"]
    assert sft.main(argv) == 0

    output = Path(recipe["output_dir"])
    record = read_defense_file(output)
    named = recipe.get("defense", "none")
    assert record["defense"] == named
    assert list(record["defenses"]) == ([] if named == "none" else named.split(","))
    assert record["global_step"] == 2
    # The recipe's own options have reached the defenses.
    reached = {key: value for defense in record["defenses"].values() for key, value in defense.items()}
    for key in reached.keys() & recipe.keys() - {"steering_vector", "inoculation_adapter", "interleave_dataset"}:
        wanted = [int(recipe[key])] if key == "steering_layers" else recipe[key]
        assert reached[key] == wanted, key
    assert (output / "adapter_model.safetensors").is_file() == recipe["use_peft"]


@pytest.mark.parametrize("path", [path for path in RECIPES if "interleave_dataset" in read(path)], ids=name_of)
def test_a_pool_still_holds_the_refusals_that_another_defense_wants(path):
    name = read(path)["interleave_dataset"]
    if name in SHIPPED:
        rows = load_rows(name)
        assert 0 < len(rank_rows(rows, "gap", drop_refusals=True)) < len(rows)
        return
    # The user makes it by the commands of the README: it is the file of the scores, of which none were chosen.
    commands = (path.parent / "README.md").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    (made,) = (command for command in commands if f"--output {name}" in command)
    assert re.search(r"\bscore\b", made)


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_every_key_is_an_option(path, machine, monkeypatch):
    monkeypatch.chdir(machine(path))
    options = read(path)
    assert not [key for key in options if key.startswith("gradient_checkpointing")]  # deprecated in transformers 5.23
    # The run above has the same options.
    parsed = sft.make_parser().parse(["--config", str(path), "--dataset_name", "rows.jsonl", "--use_cpu", "true"])
    found = {name: value for part in parsed for name, value in vars(part).items()}
    for key, value in options.items():
        if key not in ("dataset_name", "report_to"):
            assert str(getattr(found[key], "value", found[key])) == str(value), key


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_does_not_say_where_it_runs(path):
    """It moves from one accelerate file to another without a change."""
    places = (
        "use_cpu",
        "deepspeed",
        "fsdp",
        "accelerator_config",
        "ddp_",
        "tp_",
        "parallelism_config",
        "local_rank",
        "env",
    )
    assert not [key for key in read(path) if key.startswith(places)]
    # A precision that is left to a default could be the accelerate file's.
    assert isinstance(read(path)["bf16"], bool)


@pytest.mark.distributed
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    shutil.which("g++") is None, reason="DeepSpeed compiles its collectives for CPUs, and there is no g++"
)
@pytest.mark.parametrize("name", ["kl", "full", "interleaving-kl"])
def test_a_recipe_moves_from_cpu_to_zero3_by_the_accelerate_file_alone(name, machine, tmp_path):
    """On two CPU ranks; the recipes of SmolLM2, since DeepSpeed has no bf16 there."""
    recipe = recipes_dir() / f"smollm2-135m-instruct/{name}.yaml"
    home = machine(recipe)
    script = [
        "-m",
        "trl_emguard.scripts.sft",
        "--config",
        str(recipe),
        "--max_steps",
        "4",
        "--dataset_name",
        "rows.jsonl",
    ]
    script += ["--interleave_dataset", "pool.parquet", "--steering_vector", "vector.safetensors"]
    # Two ranks make half of a step's rows each, and NCCL wants GPUs.
    halves = ["--per_device_train_batch_size", "4", "--ddp_backend", "gloo"]
    histories = []
    for engine, ranks, more in (("cpu", [], []), ("zero3", ["--num_processes", "2"], halves)):
        launch = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            *ranks,
            "--config_file",
            str(ENGINES[0].with_stem(engine)),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(
            [*launch, *script, *more, "--output_dir", str(tmp_path / engine)],
            cwd=home,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        state = tmp_path / engine / "trainer_state.json"
        assert state.is_file(), done.stderr[-3000:]
        histories.append([entry for entry in json.loads(state.read_text())["log_history"] if "loss" in entry])
    for alone, sharded in zip(*histories, strict=True):
        for key in {
            "loss_ce",
            "kl",
            "grad_norm",
            "learning_rate",
            "num_tokens",
            "interleaved_fraction",
        } & alone.keys():
            assert sharded[key] == pytest.approx(alone[key], rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_recipes_of_one_model_differ_in_the_defense_alone(folder):
    def common(recipe, *others):
        return {key: value for key, value in recipe.items() if not key.startswith((*OF_A_DEFENSE, *others))}

    recipes = {path.stem: read(path) for path in folder.glob("*.yaml")}
    # `misaligned.yaml` defends nothing: it makes what a pool is scored against.
    del recipes["misaligned"]
    base = recipes["sft"]
    assert set(recipes) - {"sft", *VARIANTS} == {
        "kl",
        "ldifs",
        "treft",
        "steering",
        "inoculation",
        "inoculation-adapter",
        "interleaving",
        "interleaving-kl",
    }
    for name, recipe in recipes.items():
        own = VARIANTS.get(name, ())
        assert common(recipe, *own) == common(base, *own), name
        assert recipe["output_dir"] == f"outputs/{folder.name}" + (
            "" if name == "sft" and "smollm2" in folder.name else f"-{name}"
        )
    assert recipes["qlora"]["load_in_4bit"]
    assert not recipes["full"]["use_peft"]
    # All recipes of a defense say the same about it.
    # KL has other defaults on mixed-in rows.
    mixed = recipes["interleaving-kl"]
    assert (mixed.pop("kl_coef"), mixed.pop("kl_tokens")) == (COEFFICIENTS["interleaved"], "interleaved")
    for recipe in recipes.values():
        for key, value in recipe.items():
            if key.startswith(("kl_", "ldifs_", "treft_", "steering_", "inoculation_adapter", "interleave_")):
                (said,) = {str(other[key]) for other in recipes.values() if key in other}
                assert str(value) == said, key


def commands_of(readme):
    """The `sft` commands of a README's fenced blocks: each as its words before and after the script's name."""
    for block in re.findall(r"```bash\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for name in {"sft", "trl_emguard.scripts.sft"} & set(words):
                yield words[: words.index(name)], words[words.index(name) + 1 :]


@pytest.mark.parametrize("readme", sorted(recipes_dir().rglob("README.md")), ids=lambda path: path.parent.name)
def test_every_command_of_the_readmes_is_one(readme, machine, monkeypatch):
    """The recipe and the accelerate file are there, and the options are known."""
    commands = list(commands_of(readme))
    assert commands
    for before, options in commands:
        place = options.index("--config") + 1
        recipe = recipes_dir() / options[place].removeprefix("recipes/")
        monkeypatch.chdir(machine(recipe))
        options[place] = str(recipe)
        sft.make_parser().parse([*options, "--use_cpu", "true"])
        if before[0] == "accelerate":
            file = before[before.index("--config_file") + 1].removeprefix("recipes/")
            assert (recipes_dir() / file).is_file(), file
            launch_command_parser().parse_args([*before[2:], "trl_emguard.scripts.sft"])
        elif "--accelerate_config" in options:
            assert options[options.index("--accelerate_config") + 1] in PROMISED


# ---- the accelerate files ----

PROMISED = {  # kind, processes, machines
    "cpu": (DistributedType.NO, 1, 1),
    "single_gpu": (DistributedType.NO, 1, 1),
    "multi_gpu": (DistributedType.MULTI_GPU, 4, 1),
    "zero2": (DistributedType.DEEPSPEED, 4, 1),
    "zero3": (DistributedType.DEEPSPEED, 4, 1),
    "zero3_multi_node": (DistributedType.DEEPSPEED, 16, 2),
    "fsdp2": (DistributedType.FSDP, 4, 1),
}


def test_there_is_a_file_for_every_engine():
    assert {path.stem for path in ENGINES} == set(PROMISED)


@pytest.mark.parametrize("path", ENGINES, ids=lambda path: path.stem)
def test_an_accelerate_file_is_what_its_name_promises(path):
    config = load_config_from_file(str(path))  # refuses unknown keys
    assert (config.distributed_type, config.num_processes, config.num_machines) == PROMISED[path.stem]
    assert config.use_cpu == (path.stem == "cpu")
    # Left to the recipe, whose `bf16: false` it would overrule in silence, or clash with under DeepSpeed.
    assert config.mixed_precision is None
    assert (config.main_process_ip is not None) == (config.num_machines > 1)
    # accelerate looks at no key of an engine, and would drop a mistyped one.
    known = vars(launch_command_parser().parse_args(["script.py"]))
    assert set(config.deepspeed_config) | set(config.fsdp_config) <= set(known)
    # Keys that would change the training of the recipe.
    assert not {"gradient_accumulation_steps", "gradient_clipping", "deepspeed_config_file"} & set(
        config.deepspeed_config
    )


@pytest.mark.parametrize("path", ENGINES, ids=lambda path: path.stem)
def test_what_accelerate_tells_the_training_script(path):
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    assert arguments.mixed_precision == "no"
    if path.stem.startswith("zero"):
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, told = prepare_deepspeed_cmd_env(arguments)
        assert told["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == path.stem[4]
        sharded = str(path.stem != "zero2").lower()
        assert told["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == sharded
        assert told.get("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", "false") == sharded
        assert not {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_GRADIENT_CLIPPING"} & set(told)
    elif path.stem == "fsdp2":
        told = prepare_multi_gpu_env(arguments)
        assert (told["FSDP_VERSION"], told["FSDP_RESHARD_AFTER_FORWARD"]) == ("2", "true")
        # The Trainer's final save writes a model from this one alone; the trainer refuses the other with steering.
        assert (told["FSDP_STATE_DICT_TYPE"], told["FSDP_ACTIVATION_CHECKPOINTING"]) == ("FULL_STATE_DICT", "false")
    if path.stem == "zero3_multi_node":
        assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("2", "8", 0)
