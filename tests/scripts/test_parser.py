"""The command line and the YAML file: what counts, and what is refused before anything is loaded."""

import os

import pytest
from trl import ModelConfig, ScriptArguments, TrlParser

from trl_emguard import EMGuardConfig
from trl_emguard.io.recipes import find_recipe, recipes_dir
from trl_emguard.scripts import sft
from trl_emguard.scripts.sft import make_parser


# A machine without an accelerator needs these options.
FREE = ["--use_cpu", "true", "--bf16", "false"]


@pytest.fixture
def yaml_file(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def parse(tmp_path):
    """All options of a command line, as one namespace of the last dataclass that has them."""

    def run(*argv):
        merged = {}
        for part in make_parser().parse([*FREE, "--output_dir", str(tmp_path), *argv]):
            merged.update(vars(part))
        return merged

    return run


@pytest.fixture
def refused(capsys, monkeypatch):
    """Runs a bad command line and returns its one line on stderr."""

    def run(*argv):
        monkeypatch.setattr(sft, "run", lambda *args: pytest.fail("the run began"))
        with pytest.raises(SystemExit) as stop:
            sft.main([*FREE, *argv])
        captured = capsys.readouterr()
        assert stop.value.code not in (0, None)
        assert captured.out == ""
        assert captured.err.startswith("trl-emguard sft: error: ")
        assert captured.err.count("\n") == 1
        return captured.err

    return run


# ---- what counts ----


def test_defaults(parse):
    options = parse()
    assert options["defense"] == "none"
    assert (options["kl_coef"], options["ldifs_coef"], options["ldifs_layers"]) == (None, 1.0, "every:5")


def test_command_line_options(parse):
    options = parse(
        *("--defense", "kl,ldifs", "--kl_coef", "0.5", "--kl-direction", "forward", "--kl_tokens=all"),
        *("--ldifs_layers", "4,8", "--no_ldifs_normalize", "--model_name_or_path", "m", "--lora_r", "3"),
    )
    expected = {
        "defense": "kl,ldifs",
        "kl_coef": 0.5,
        "kl_direction": "forward",
        "kl_tokens": "all",
        "ldifs_layers": "4,8",
        "ldifs_normalize": False,
        "model_name_or_path": "m",
        "lora_r": 3,
    }
    assert {key: options[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        ([], False),
        (["--cache_reference"], True),
        (["--cache_reference", "true"], True),
        (["--cache_reference", "false"], False),
    ],
)
def test_cache_reference_is_off_by_default(parse, argv, value):
    assert parse("--defense", "kl", *argv)["cache_reference"] is value
    assert EMGuardConfig("unused", use_cpu=True, bf16=False).cache_reference is False


def test_the_command_line_turns_resuming_off(parse, yaml_file):
    config = yaml_file("resume_from_checkpoint: true")
    assert parse("--config", config)["resume_from_checkpoint"] is True
    assert parse("--config", config, "--resume_from_checkpoint", "false")["resume_from_checkpoint"] is None


@pytest.mark.parametrize("name", ["kl_coef", "ldifs_coef", "treft_coef", "steering_coef"])
def test_a_coefficient_is_a_number_or_a_schedule(parse, name):
    assert parse(f"--{name}", "0.4->0.05")[name] == "0.4->0.05"
    number = parse(f"--{name}", "2")[name]
    assert (number, type(number)) == (2.0, float)


@pytest.mark.parametrize("name", ["kl_coef", "ldifs_coef", "treft_coef", "steering_coef"])
@pytest.mark.parametrize(("text", "value"), [("0.4->0.05", "0.4->0.05"), ("2.5", 2.5), ("1e-2", 0.01)])
def test_a_script_with_trls_own_parser_takes_a_schedule(tmp_path, yaml_file, name, text, value):
    parser = TrlParser((ScriptArguments, EMGuardConfig, ModelConfig))
    rest = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    for given in (["--" + name, text], ["--config", yaml_file(f"{name}: {text}\n")]):
        _, args, _ = parser.parse_args_and_config([*given, *rest])
        assert (getattr(args, name), type(getattr(args, name))) == (value, type(value))


def test_yaml_counts(parse, yaml_file):
    path = yaml_file("defense: kl\nkl_coef: 0.5\nldifs_normalize: false\nlora_r: 3\n")
    options = parse("--config", path)
    assert (options["defense"], options["kl_coef"], options["lora_r"]) == ("kl", 0.5, 3)
    assert options["ldifs_normalize"] is False


@pytest.mark.parametrize("before", [True, False])
def test_command_line_wins_over_yaml(parse, yaml_file, before):
    path = yaml_file("defense: kl\nkl_coef: 0.5\nldifs_normalize: false\n")
    config, options = ["--config", path], ["--defense", "ldifs", "--kl_coef", "0.25", "--ldifs_normalize", "true"]
    options = parse(*config, *options) if before else parse(*options, *config)
    assert (options["defense"], options["kl_coef"], options["ldifs_normalize"]) == ("ldifs", 0.25, True)


def test_config_with_equals_sign(parse, yaml_file):
    assert parse(f"--config={yaml_file('defense: ldifs')}")["defense"] == "ldifs"


def test_shipped_recipe_by_its_name(parse, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    options = parse("--config", "smollm2-135m-instruct/sft.yaml", "--defense", "kl")
    assert (options["dataset_name"], options["learning_rate"], options["defense"]) == ("plants_careless", 2e-4, "kl")


def test_recipe_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("defense: kl")
    assert find_recipe("~/run.yaml") == tmp_path / "run.yaml"


@pytest.mark.parametrize("recipe", sorted(str(p.relative_to(recipes_dir())) for p in recipes_dir().glob("*/sft.yaml")))
@pytest.mark.parametrize("defense", ["none", "kl", "ldifs"])
def test_every_recipe_parses(parse, recipe, defense):
    assert parse("--config", recipe, "--defense", defense)["defense"] == defense


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("ldifs_layers: [4, 8]", "ldifs_layers", [4, 8]),
        ('ldifs_layers: "4,8"', "ldifs_layers", "4,8"),
        ("ldifs_layers: 4", "ldifs_layers", 4),
        ("learning_rate: 1e-4", "learning_rate", 1e-4),
        ('kl_coef: "0.5"', "kl_coef", 0.5),
        ("kl_coef: 0", "kl_coef", 0),
        ("kl_coef: 0.4->0.05", "kl_coef", "0.4->0.05"),
        ('ldifs_coef: "0->1"', "ldifs_coef", "0->1"),
        ("max_length:", "max_length", None),
        ("max_length: 17", "max_length", 17),
        ("neftune_noise_alpha:", "neftune_noise_alpha", None),
        ("dataset_name:", "dataset_name", None),
        ("ref_model_init_kwargs: {dtype: bfloat16}", "ref_model_init_kwargs", {"dtype": "bfloat16"}),
        ("lora_target_modules: all-linear", "lora_target_modules", "all-linear"),
        ("lora_target_modules: [q_proj, v_proj]", "lora_target_modules", ["q_proj", "v_proj"]),
        ("lora_modules_to_save: lm_head", "lora_modules_to_save", ["lm_head"]),
        ("label_names: labels", "label_names", ["labels"]),
        ("debug: underflow_overflow", "debug", ["underflow_overflow"]),
        ("report_to: none", "report_to", []),
        ('save_strategy: "no"', "save_strategy", "no"),
        ("tf32: false", "tf32", False),
        ("include_num_input_tokens_seen: false", "include_num_input_tokens_seen", "no"),
        ("resume_from_checkpoint: true", "resume_from_checkpoint", True),
        ("resume_from_checkpoint: 500", "resume_from_checkpoint", "500"),
        ("dataset_config: 2024-01-01", "dataset_config", "2024-01-01"),
    ],
)
def test_yaml_value_works(parse, yaml_file, text, key, value):
    parsed = parse("--config", yaml_file(text), "--defense", "kl,ldifs")[key]
    assert (parsed, type(parsed) is bool) == (value, type(value) is bool)


def test_yaml_env(parse, yaml_file, monkeypatch):
    monkeypatch.setenv("TRL_EMGUARD_TEST_TEXT", "before")
    monkeypatch.delenv("TRL_EMGUARD_TEST_NUMBER", raising=False)
    parse("--config", yaml_file("env:\n  TRL_EMGUARD_TEST_TEXT: after\n  TRL_EMGUARD_TEST_NUMBER: 3\ndefense: kl\n"))
    assert os.environ.pop("TRL_EMGUARD_TEST_NUMBER") == "3"
    assert os.environ["TRL_EMGUARD_TEST_TEXT"] == "after"


def test_yaml_mixture_of_data_sets(parse, yaml_file):
    text = "datasets:\n  - path: a\n    split: train\n  - path: b\n"
    assert [mixed.path for mixed in parse("--config", yaml_file(text))["datasets"]] == ["a", "b"]
    assert [mixed.path for mixed in parse("--config", yaml_file("datasets: {path: a}"))["datasets"]] == ["a"]


def test_help_is_no_error(capsys):
    with pytest.raises(SystemExit) as stop:
        make_parser().parse(["--help"])
    assert stop.value.code == 0
    assert "--kl_coef" in capsys.readouterr().out


# ---- what is refused ----


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--defens", "kl"], ["--defens", "--defense"]),
        (["--defens=kl"], ["--defens", "--defense"]),
        (["--defence", "kl"], ["--defence", "--defense"]),
        (["--kl_coeff", "0.1"], ["--kl_coeff", "--kl_coef"]),
        (["--kl-coeff", "0.1"], ["--kl-coeff", "--kl-coef"]),
        (["--ldifs_layer", "4"], ["--ldifs_layer", "--ldifs_layers"]),
        (["--confi", "x.yaml"], ["--confi", "--config"]),
        (["kl"], ["kl"]),
        (["--defense", "kl", "ldifs"], ["'ldifs'", "--defense kl,ldifs."]),
        (["--defense", "interleave++", "kl"], ["'kl'", "--defense interleave++,kl."]),
        (["--defense", "kl", "kl"], ["'kl'", "--defense kl."]),
        (["dry_run"], ["'dry_run'", "Did you mean '--dry_run'?"]),
        (["run.yaml"], ["'run.yaml'", "--config run.yaml"]),
        (["--ldifs_layers", "4", "8"], ["8"]),
        (["--defense"], ["--defense"]),
        (["--defense", "kll"], ["kll", "'kl'", "none, kl, ldifs"]),
        (["--defense", "ldif"], ["ldif", "'ldifs'"]),
        (["--defense", "no"], ["'no'", "none"]),
        (["--defense", "KL"], ["'KL'", "none, kl, ldifs"]),
        (["--defense", ""], ["''", "none"]),
        (["--defense", "kl,"], ["'kl,'"]),
        (["--defense", "kl,none"], ["kl,none"]),
        (["--defense", "kl,kl"], ["kl,kl", "twice"]),
        (["--defense", "interleave++", "--defense=kl"], ["--defense is given 2 times", "interleave++,kl"]),
        (["--kl_tokens", "al"], ["kl_tokens", "'al'", "'all'", "loss, all"]),
        (["--kl_direction", "backward", "--defense", "kl"], ["kl_direction", "backward", "reverse, forward"]),
        (["--lr_scheduler_type", "cosin"], ["lr_scheduler_type", "cosin", "'cosine'"]),
        (["--defense", "kl", "--kl_coef", "abc"], ["kl_coef", "abc"]),
        (["--defense", "kl", "--kl_coef", "-1"], ["kl_coef", "-1"]),
        (["--defense", "kl", "--kl_coef", "nan"], ["kl_coef", "nan"]),
        (["--defense", "kl", "--kl_coef", "inf"], ["kl_coef", "inf"]),
        (["--defense", "kl", "--kl_coef", "0.4->"], ["kl_coef='0.4->'", "two finite numbers", "'0.4->0.05'"]),
        (["--interleave_fraction", "0.1->0.2"], ["--interleave_fraction", "0.1->0.2"]),
        (["--defense", "ldifs", "--ldifs_coef", "-0.5"], ["ldifs_coef", "-0.5"]),
        (["--defense", "ldifs", "--ldifs_layers", "evry:5"], ["ldifs_layers", "evry:5", "every:5"]),
        (["--defense", "ldifs", "--ldifs_layers", "0,4"], ["ldifs_layers", "0"]),
        (["--ldifs_normalize", "maybe"], ["ldifs_normalize", "maybe"]),
        (["--defense", "kl", "--loss_type", "dft"], ["loss_type", "dft", "kl"]),
        (["--defense", "kl", "--label_smoothing_factor", "0.1"], ["label_smoothing_factor", "0.1"]),
        (["--defense", "kl", "--neftune_noise_alpha", "5"], ["neftune_noise_alpha", "5"]),
        (["--ref_model_init_kwargs", "{oops"], []),
    ],
)
def test_bad_command_line_is_refused(refused, argv, words):
    line = refused(*argv)
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("defense: no", ["defense", "false", "quotes"]),
        ("defense: off", ["defense", "false"]),
        ("defense:", ["defense", "empty", "none"]),
        ("defense: ~", ["defense", "empty"]),
        ("defense: kll", ["kll", "'kl'"]),
        ("defense: [kl]", ["kl", "must be text (several are written as interleave++,kl)"]),
        ("dataset_name: [a.jsonl, b.jsonl]", ["dataset_name=['a.jsonl', 'b.jsonl'] must be text", "`datasets`"]),
        ("interleave_where: {harm: none}", ["interleave_where={'harm': 'none'} must be text (COLUMN=VALUE)"]),
        ("defense: 1", ["1"]),
        ("defens: kl", ["defens", "'defense'"]),
        ("kl-coef: 0.1", ["kl-coef", "'kl_coef'"]),
        ("no_ldifs_normalize: true", ["no_ldifs_normalize", "'ldifs_normalize'"]),
        ("help: true", ["help"]),
        ("1: 2", ["'1'"]),
        ("kl_tokens: al", ["kl_tokens", "'al'", "'all'", "loss, all"]),
        ("kl_tokens: no", ["kl_tokens", "false"]),
        ("kl_tokens: [loss]", ["kl_tokens", "loss, all"]),
        ("kl_direction:", ["kl_direction", "empty"]),
        ("kl_direction: 1", ["kl_direction", "'1'", "reverse, forward"]),
        ("lr_scheduler_type: cosin", ["lr_scheduler_type", "cosin", "'cosine'"]),
        ("ddp_backend: no", ["ddp_backend", "false"]),
        ("save_strategy: no", ["save_strategy", "false", "quotes"]),
        ('kl_coef: "abc"', ["kl_coef", "abc"]),
        ("kl_coef: a->b", ["kl_coef='a->b'", "two finite numbers", "'0.4->0.05'"]),
        ("interleave_fraction: 0.1->0.2", ["--interleave_fraction", "0.1->0.2"]),
        ("kl_coef: yes", ["kl_coef", "true"]),
        ("kl_coef: -1", ["kl_coef", "-1"]),
        ("kl_coef: .nan", ["kl_coef", "nan"]),
        ("kl_coef: .inf", ["kl_coef", "inf"]),
        ("ldifs_coef:", ["ldifs_coef", "empty", "1.0"]),
        ("kl_coef: [0.1]", ["kl_coef", "[0.1]"]),
        ("kl_coef: {a: 1}", ["kl_coef"]),
        ("ldifs_coef: -1", ["ldifs_coef", "-1"]),
        ("ldifs_layers:", ["ldifs_layers", "empty", "every:5"]),
        ("ldifs_layers: []", ["ldifs_layers", "[]"]),
        ("ldifs_layers: [4, 4]", ["ldifs_layers", "twice"]),
        ("ldifs_layers: [4.0]", ["ldifs_layers", "4.0"]),
        ("ldifs_layers: 0", ["ldifs_layers", "0"]),
        ("ldifs_layers: yes", ["ldifs_layers", "true"]),
        ("ldifs_normalize: 1", ["ldifs_normalize", "true or false"]),
        ('ldifs_normalize: "maybe"', ["ldifs_normalize", "true or false"]),
        ("ldifs_normalize:", ["ldifs_normalize", "empty"]),
        ("bf16: 2", ["bf16", "true or false"]),
        ("max_steps: 1.5", ["max_steps", "1.5", "whole number"]),
        ("max_steps: yes", ["max_steps", "true"]),
        ("neftune_noise_alpha: yes", ["neftune_noise_alpha", "true"]),
        ("max_length: 17.5", ["max_length", "17.5", "whole number"]),
        ("learning_rate: [1.0e-4]", ["learning_rate", "number"]),
        ("learning_rate:", ["learning_rate", "empty"]),
        ("env: [A]", ["env"]),
        ("env:", ["env"]),
        ("datasets:\n  - pth: a\n", ["pth"]),
        ("debug: underflow", ["config", "debug", "underflow"]),
        ("", ["key: value"]),
        ("- defense: kl", ["key: value"]),
        ("kl", ["key: value"]),
        ("defense: kl\nkl_coef: 1\ndefense: none", ["cannot be read", "'defense'", "twice"]),
        ("ref_model_init_kwargs: {dtype: float32, dtype: bfloat16}", ["'dtype'", "twice"]),
        ("defense: [kl", ["cannot be read"]),
        ("defense: kl\n\tkl_coef: 1", ["cannot be read"]),
        ("defense: !!python/object/apply:os.getcwd []", ["cannot be read"]),
    ],
)
def test_bad_yaml_is_refused(refused, yaml_file, text, words):
    line = refused("--config", yaml_file(text), *([] if "defens" in text else ["--defense", "kl,ldifs"]))
    for word in words:
        assert word in line


def test_a_bad_yaml_value_is_refused_though_the_command_line_wins(refused, yaml_file):
    assert "defense" in refused("--config", yaml_file("defense: no"), "--defense", "kl")


@pytest.mark.parametrize("form", ["{}", "~nobody-of-that-name/{}", "./{}"])
def test_missing_config_is_refused(refused, tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    path = form.format("missing.yaml")
    assert path in refused("--config", path)
    assert path in refused(f"--config={path}")


@pytest.mark.parametrize("argv", [["--config"], ["--config="], ["--defense", "kl", "--config"]])
def test_config_without_a_path_is_refused(refused, argv):
    assert "config" in refused(*argv)


def test_two_configs_are_refused(refused, yaml_file):
    """They would not be merged: the first one's defense would be lost."""
    path = yaml_file("defense: kl")
    assert "--config is given 2 times" in refused("--config", path, f"--config={path}")


def test_config_that_is_a_folder_is_refused(refused, tmp_path):
    assert str(tmp_path) in refused("--config", str(tmp_path))


@pytest.mark.parametrize("content", [b"defense: \xff\xfe", b"defense: kl\x00"])
def test_config_that_is_no_text_is_refused(refused, tmp_path, content):
    (tmp_path / "run.yaml").write_bytes(content)
    assert "cannot be read" in refused("--config", str(tmp_path / "run.yaml"))


def test_unreadable_config_is_refused(refused, yaml_file, monkeypatch):
    path = yaml_file("defense: kl")

    def denied(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.read_text", denied)
    line = refused("--config", path)
    assert "cannot be read" in line
    assert "Permission denied" in line


def test_output_dir_that_is_a_file_is_refused(refused, tmp_path):
    (tmp_path / "taken").write_text("")
    assert "is a file" in refused("--output_dir", str(tmp_path / "taken"))


@pytest.mark.parametrize(
    ("file", "argv"),
    [
        ("activation_checkpointing: true", ["--gradient_checkpointing", "false"]),
        ("activation_checkpointing: true", ["--no_gradient_checkpointing"]),
        ("activation_checkpointing: false", ["--gradient-checkpointing=true"]),
        ("gradient_checkpointing: true", ["--activation_checkpointing", "false"]),
        ("activation_checkpointing: true\ngradient_checkpointing: false", []),
        ("seed: 1", ["--activation_checkpointing", "--gradient_checkpointing", "false"]),
        (
            "activation_checkpointing_kwargs: {every_n_layers: 2}",
            ["--gradient_checkpointing_kwargs", '{"every_n_layers": 1}'],
        ),
    ],
)
def test_an_old_name_that_would_be_ignored_is_refused(refused, yaml_file, file, argv):
    error = refused("--config", yaml_file(file), *argv)
    assert "gradient_checkpointing" in error
    assert "--activation_checkpointing" in error


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("file", "argv", "value"),
    [
        ("activation_checkpointing: true", ["--activation_checkpointing", "false"], False),
        ("gradient_checkpointing: true", ["--gradient_checkpointing", "false"], False),
        ("activation_checkpointing: true", ["--gradient_checkpointing", "true"], True),
        ("seed: 1", ["--no_gradient_checkpointing"], False),
        ("activation_checkpointing: false", [], False),
    ],
)
def test_checkpointing_under_one_name(parse, yaml_file, file, argv, value):
    options = parse("--config", yaml_file(file), *argv)
    assert options["activation_checkpointing"] is options["gradient_checkpointing"] is value
