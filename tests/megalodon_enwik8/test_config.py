"""The schema: what it accepts, and that every mistake is one line that names it."""

import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megalodon_enwik8.config import ExperimentConfig, load_config, make_config
from megalodon_enwik8.safety import UserError

CONFIGS = Path(__file__).parents[2] / "configs"

PUBLISHED = Path(__file__).parent / "published"

NULL = {"rope_base": 10_000.0, "seed": -1}  # what null means where it means something


@pytest.fixture
def refuse(tmp_path):
    """refuse(text, *overrides): the one line of the UserError that the config raises."""

    def load(text, *overrides):
        path = tmp_path / "x.yaml"
        path.write_text(text)
        with pytest.raises(UserError) as caught:
            load_config(path, overrides)
        line = str(caught.value).replace(str(path), "x.yaml")
        assert "\n" not in line
        return line

    return load


@pytest.mark.parametrize("path", sorted(PUBLISHED.glob("*.yaml")), ids=lambda path: path.stem)
def test_published_files_mean_what_they_say(path):
    config = load_config(path)
    for key, value in yaml.safe_load(path.read_text()).items():
        assert getattr(config, key) == (NULL.get(key) if value is None else value), key
    assert config.model == ("megalodon" if "megalodon" in path.stem else "llama")
    if "weight_decay" not in path.read_text():
        assert config.weight_decay == 0.0  # as there


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_files_load_and_run_in_a_folder_of_their_name(path):
    assert load_config(path).run_dir == f"runs/{path.stem}"


def test_both_models_of_the_comparison_get_the_same_protocol():
    def protocol(name):
        config = load_config(CONFIGS / f"{name}.yaml")
        used = config.used() | {"sequences_per_step": config.sequences_per_step}
        return {key: used[key] for key in [*shared, "sequences_per_step"]}

    used_by = [
        make_config({"run_dir": "x", "model": name}, "x").used().keys()
        for name in ("llama", "megalodon")
    ]
    free = {"model", "run_dir", "data_path", "batch_size", "grad_accum_every"}
    shared = (used_by[0] & used_by[1]) - free
    llama = protocol("llama_512")
    assert protocol("megalodon_multichunk_512") == llama
    sample = {**llama, "use_autocast": "auto"}  # for any processor
    assert protocol("llama_sample") == sample
    assert protocol("megalodon_sample") == sample
    assert llama["num_batches"] == 1200
    assert llama["sequences_per_step"] == 16
    assert llama["learning_rate"] == 4e-4
    assert llama["weight_decay"] == 2e-4


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "chunk_size: 0\nmodel: megalodon",
            "x.yaml: chunk_size=0: Input should be greater than or equal to 1",
        ),
        ("nm_layers: 2", "x.yaml: nm_layers: unknown key; did you mean num_layers?"),
        ("zzz: 2", "x.yaml: zzz: unknown key; see megalodon_enwik8/config.py"),
        ("3: 2", "x.yaml: 3: unknown key; see megalodon_enwik8/config.py"),
        ("model: lama", "x.yaml: model=lama: Input should be 'megalodon' or 'llama'"),
        ("seed: true", "x.yaml: seed=True: Input should be a valid integer"),
        ("seed: -2", "x.yaml: seed=-2: Input should be greater than or equal to -1"),
        ("batch_size: '4'", "x.yaml: batch_size=4: Input should be a valid integer"),
        ("learning_rate: 0", "x.yaml: learning_rate=0: Input should be greater than 0"),
        ("min_lr: 1e-5", "x.yaml: min_lr=1e-05: is where schedule: cosine ends, and at most learn"),
        ("schedule: cosine\nmin_lr: 1", "min_lr=1.0: is where schedule: cosine ends, and at most"),
        ("beta2: 1", "x.yaml: beta2=1: Input should be less than 1"),
        ("optimizer: sgd", "x.yaml: optimizer=sgd: Input should be 'adam' or 'adamw'"),
        ("learning_rate: .nan", "x.yaml: learning_rate=nan: Input should be a finite number"),
        ("attention_dropout: 1", "x.yaml: attention_dropout=1: Input should be less than 1"),
        ("min_p: 1.1", "x.yaml: min_p=1.1: Input should be less than or equal to 1"),
        ("keep_last: 0", "x.yaml: keep_last=0: Input should be greater than or equal to 1"),
        ("run_dir: ''", "run_dir=: String should match pattern"),
        ('run_dir: "a\\0b"', "String should match pattern"),
        ("num_tokens: 255", "x.yaml: num_tokens=255: Input should be greater than or equal to 256"),
        ("use_autocast: float16", "use_autocast=float16: Input should be True, False or 'auto'"),
        ("compile: maybe", "x.yaml: compile=maybe: Input should be True, False, 'auto' or"),
        ("compile: graphs", "x.yaml: compile=graphs: replays what ran before, one micro-batch"),
        ("dim_head: 7", "x.yaml: dim_head=7: Input should be a multiple of 2"),
        ("num_layers: 6", "x.yaml: num_layers=6: is a key of model: megalodon, but this is model:"),
        ("model: megalodon\ndepth: 6", "x.yaml: depth=6: is a key of model: llama, but this is"),
        (
            "model: megalodon\nablation: one_hop+no_cema",
            "x.yaml: ablation=one_hop+no_cema: must be none, or one of no_cema, layer_norm, "
            "one_hop, sharp_scores, or several of them in this order, joined by +",
        ),
        ("seed: 1\nseed: 2", "x.yaml: line 1: not valid YAML: seed is given twice"),
        ("seed: 1\nmodel: [", "x.yaml: line 2: "),
        ("- 1", "x.yaml: must hold `key: value` lines, not a list"),
        ("seed: !!python/object/apply:os.getpid []", "could not determine a constructor"),
        ("seed: !!bool x", "x.yaml: not valid YAML"),
        ("seed: \x07", "x.yaml: not valid YAML"),
        ("[" * 5000, "x.yaml: "),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_mistake_is_one_line_naming_key_value_and_remedy(refuse, text, line):
    assert line in refuse(text)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("seed=x", "x.yaml and command line: seed=x: Input should be a valid integer"),
        ("sed=1", "x.yaml and command line: sed: unknown key; did you mean seed?"),
        ("seed", "command line: 'seed': expected key=value, as in num_batches=100"),
        ("=1", "command line: '=1': expected key=value"),
        ("seed=[", "command line: 'seed': line 1: "),
        ("a\nb=[", "command line: 'a\\nb': line 1: "),
        ("data_path=my #1.txt", "'data_path=my #1.txt': # begins a comment: put the value in quo"),
        ("data_path=#1.txt", "'data_path=#1.txt': # begins a comment"),
        (
            "model=megalodon",
            "line: dim=384: is a key of model: llama, but this is model: mega",
        ),
    ],
)
def test_a_wrong_override_is_named_as_such(refuse, override, line):
    assert line in refuse("dim: 384", override)


def test_an_override_is_given_once(refuse):
    assert "command line: seed is given twice" in refuse("dim: 384", "seed=1", "seed=1")


def test_overrides_win_and_are_read_as_yaml(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("seed: 1\ncompile: auto")
    config = load_config(path, ["data_path='my #1.txt'"])
    assert config.data_path == "my #1.txt"
    config = load_config(path, ["seed=2", "compile=false", "learning_rate=1e-3", "data_bytes=null"])
    assert (config.seed, config.compile, config.learning_rate) == (2, False, 1e-3)


def test_an_empty_file_is_the_llama_of_the_protocol(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n")
    config = load_config(path)
    assert (config.model, config.run_dir) == ("llama", "runs/empty")


@pytest.mark.parametrize("bomb", ["a{n}: &a{n} [{nine}]", "a{n}: &a{n} {{<<: [{nine}]}}"])
def test_a_file_that_grows_without_bound_is_refused_in_a_short_line(refuse, bomb):
    levels = (bomb.format(n=n, nine=", ".join([f"*a{n - 1}"] * 9)) for n in range(1, 30))
    assert len(refuse("\n".join(["a0: &a0 {x: 1}", *levels]))) < 200


def attempt(load):
    """The config, or the line of the UserError."""
    try:
        return load()
    except UserError as error:
        return str(error)


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.integers(), max_size=2),
)
keys = st.sampled_from([*ExperimentConfig.model_fields, "modl", "", "x y"])


@given(st.dictionaries(keys, scalars, max_size=6), st.sampled_from(["llama", "megalodon"]))
def test_any_mapping_is_a_config_or_one_line(values, model):
    outcome = attempt(lambda: make_config({"run_dir": "x", "model": model, **values}, "x.yaml"))
    if isinstance(outcome, str):
        assert outcome.startswith("x.yaml: ")
        assert "\n" not in outcome
    else:
        for key, value in values.items():
            used = getattr(outcome, key)
            if value is None:
                assert used == NULL.get(key)
            else:
                assert used == value or math.isclose(used, float(value))


texts = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=9)
valid = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**63 - 1),
        "learning_rate": st.floats(1e-9, 1e3),
        "compile": st.sampled_from([True, False, "auto"]),
        "keep_last": st.one_of(st.none(), st.integers(1, 9)),
        "use_autocast": st.sampled_from([True, False, "auto"]),
    },
)


@given(valid, texts, st.sampled_from(["llama", "megalodon"]))
def test_a_config_survives_its_own_file(tmp_path_factory, values, text, model):
    config = make_config({**values, "run_dir": text, "data_path": text, "model": model}, "x.yaml")
    path = tmp_path_factory.getbasetemp() / "written.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(path) == config


def test_learning_rate_rises_then_stays_or_falls():
    def rates(**changes):
        config = make_config({"run_dir": "x", "learning_rate": 1.0, "num_batches": 8} | changes, "")
        return [config.learning_rate_at(step) for step in range(8)]

    assert rates() == [1.0] * 8
    assert rates(warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]
    half_wave = [0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    assert rates(warmup_steps=4, schedule="cosine") == [0.25, 0.5, 0.75, 1.0, *half_wave]
    assert rates(warmup_steps=8, schedule="cosine") == [k / 8 for k in range(1, 9)]
    floor = [0.2 + 0.8 * rate for rate in half_wave]
    assert rates(warmup_steps=4, schedule="cosine", min_lr=0.2)[4:] == pytest.approx(floor)


def test_a_run_folder_in_the_home_folder_is_there(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert make_config({"run_dir": "~/runs/x"}, "x").run_dir == "/home/someone/runs/x"
