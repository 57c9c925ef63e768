"""The config: which source a value comes from, what is refused, and with which message."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import get_type_hints

import pytest
from own_config import OWN, refused
from typer import Context
from typer.main import get_command

from cli.main import app
from dice_py import mine_pairs
from dice_py.config.loading import dump, known_keys, load_resolved, resolve
from dice_py.config.mining import PANELS, MineConfig, MiningKeywords, MiningOptions, PairOptions
from dice_py.config.run import RunConfig
from dice_py.errors import UsageError
from dice_py.mining.files import mine_files


def test_later_files_win_then_options_then_assignments(yaml_file) -> None:
    first = yaml_file("rounds: 3\nseed: 1\nbeta: 0.2\ngenerate: {samples: 4, top_p: 0.5}\n", "first.yaml")
    second = yaml_file("seed: 2\nbeta: 0.3\ngenerate: {samples: 5}\n", "second.yaml")
    config = resolve([first, second], ["beta=0.5"], {"beta": 0.4, "seed": 3})
    assert (config.rounds.count, config.seed, config.beta) == (3, 3, 0.5)
    # Sections are merged key by key, not replaced.
    assert (config.generate.samples, config.generate.top_p) == (5, 0.5)


def test_one_assignment_after_another(yaml_file) -> None:
    assert resolve([], ["rounds=4", "rounds=5"]).rounds.count == 5
    lora = resolve([], ["train.lora.r=8", "train.lora.dropout=0.1"]).train.lora
    assert lora is not None
    assert (lora.r, lora.dropout) == (8, 0.1)
    # An empty value, as in YAML, is none.
    assert resolve([], ["train.lora.r=8", "train.lora="]).train.lora is None


def test_an_empty_file_changes_nothing(yaml_file) -> None:
    assert resolve([yaml_file("# only a remark\n")]) == resolve()


@pytest.mark.parametrize("text", ["5e-7", "5.0e-7", "0.0000005", "+5e-7"])
def test_numbers_as_people_write_them(yaml_file, text: str) -> None:
    # YAML 1.1 takes 5e-7 for text, since it wants a point and a signed exponent.
    assert resolve([], [f"train.learning_rate={text}"]).train.learning_rate == 5e-7
    path = yaml_file(f"train:\n  learning_rate: {text}\n")
    assert resolve([path]).train.learning_rate == 5e-7


def test_text_that_looks_like_a_number_stays_text() -> None:
    # A git revision: it must reach the hub as it is.
    assert resolve([], ["model.policy_revision=12e4567"]).model.policy_revision == "12e4567"
    assert resolve([], ["data.prompt_column=inf"], one_stage=True).data.prompt_column == "inf"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("trian.learning_rate=1", "unknown key 'trian'; did you mean 'train'?"),
        ("train.learning_rat=1", "unknown key 'train.learning_rat'; did you mean 'train.learning_rate'?"),
        ("train.learning-rate=1", "did you mean 'train.learning_rate'?"),
        ("generate.vllm.max_seqs=1", "did you mean 'generate.vllm.max_num_seqs'?"),
        ("train.lora.drop_out=0", "unknown key 'train.lora.drop_out'; did you mean 'train.lora.dropout'?"),
        # A known key in the wrong section, or in none.
        ("gamma=0.5", "unknown key 'gamma'; did you mean 'replay.gamma'?"),
        ("samples=8", "did you mean 'generate.samples' or 'evaluate.samples'?"),
        ("generate.gamma=0.5", "did you mean 'replay.gamma'?"),
        # No known key is similar: all keys of the section.
        ("replay.xyzzy=1", "unknown key 'replay.xyzzy'; the keys of 'replay' are gamma, total, on_shortfall"),
        ("xyzzy=1", "unknown key 'xyzzy'; the keys are rounds, seed, beta"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest(assignment: str, message: str) -> None:
    assert message in refused(assignment)


def test_unknown_key_in_a_file(yaml_file) -> None:
    assert "did you mean 'mine.debias'?" in refused(files=(yaml_file("mine:\n  debis: none\n"),))


def test_all_errors_are_reported_at_once() -> None:
    message = refused("replay.gama=0.5", "rounds=0")
    assert "'replay.gamma'" in message
    assert "rounds.count: Input should be greater than or equal to 1 (got 0)" in message


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("replay.gamma=1.5", "replay.gamma: Input should be less than or equal to 1 (got 1.5)"),
        ("replay.gamma=-0.1", "replay.gamma: Input should be greater than or equal to 0 (got -0.1)"),
        ("replay.gamma=.nan", "replay.gamma: Input should be a finite number"),
        ("generate.samples=1", "generate.samples: Input should be greater than or equal to 2 (got 1)"),
        ("generate.top_p=0", "generate.top_p: Input should be greater than 0"),
        ("generate.temperature=0", "generate.temperature: Input should be greater than 0"),
        ("beta=0", "beta: Input should be greater than 0"),
        ("beta=.inf", "beta: Input should be a finite number"),
        ("train.num_train_epochs=inf", "train.num_train_epochs: Input should be a finite number"),
        ("seed=-1", "seed: Input should be greater than or equal to 0"),
        ("mine.alpha=-1", "mine: alpha is -1.0, but must be 'auto' or a finite number of zero or more"),
        ("mine.alpha=low", "mine.alpha: Input should be 'auto' (got 'low')"),
        ("mine.min_responses=1", "mine: min_responses is 1, but must be 2 or more: a pair is two responses"),
        (
            "generate.engine=vlm",
            "generate.engine: Input should be 'auto', 'transformers' or 'vllm' (got 'vlm')",
        ),
        ("train=5", "train: Input should be a valid dictionary"),
        ("train.batch_size=30", "train: batch_size (30) must be a multiple of per_device_train_batch_size (32)"),
    ],
)
def test_values_out_of_range(assignment: str, message: str) -> None:
    assert message in refused(assignment)


@pytest.mark.parametrize("gamma", [0, 1])
def test_both_ends_of_gamma(gamma: int) -> None:
    assert resolve([], [f"replay.gamma={gamma}"]).replay.gamma == gamma


def test_values_that_contradict_each_other() -> None:
    message = refused("mine.min_length=10", "mine.max_length=9")
    assert "mine: min_length is 10 and max_length 9: no length can be both" in message
    message = refused("generate.samples=4", "mine.min_responses=5")
    assert "mine.min_responses is 5, but generate.samples is 4: no prompt could give a pair" in message


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("rounds", "--set rounds: write it as --set section.key=value"),
        ("=3", "--set =3: write it as --set section.key=value"),
        ("rounds=[1", "--set rounds=[1: the value is not valid YAML"),
    ],
)
def test_malformed_assignments(assignment: str, message: str) -> None:
    assert message in refused(assignment)


def test_files_that_are_not_a_config(yaml_file, tmp_path: Path) -> None:
    assert f"{tmp_path / 'absent.yaml'} does not exist" in refused(files=(tmp_path / "absent.yaml",))
    assert "is not valid YAML" in refused(files=(yaml_file("a: [1"),))
    assert "must hold a mapping of keys, not a list" in refused(files=(yaml_file("- 1\n"),))
    assert "not a regular file" in refused(files=(tmp_path,))
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"a: \xff\xfe\n")
    assert f"{binary} cannot be read" in refused(files=(binary,))


def test_the_world_defaults_are_for_the_world_only() -> None:
    world, own, plain = resolve(), resolve([], [], OWN), RunConfig()
    assert world.is_world
    assert not own.is_world
    assert (world.generate.samples, own.generate.samples) == (8, plain.generate.samples)
    assert (world.train.learning_rate, own.train.learning_rate) == (1e-4, 5e-7)
    assert (world.beta, own.beta) == (1.0, plain.beta)
    # The user's values override them; a single stage does not use them.
    assert resolve([], ["generate.samples=3"]).generate.samples == 3
    assert resolve(one_stage=True) == plain


def test_resolving_twice_gives_the_same() -> None:
    # The table of defaults must not be modified.
    resolve([], ["generate.samples=3", "train.lora.r=4"])
    assert resolve().generate.samples == 8
    assert resolve().train.lora is None


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        (("model", "reference"), "a run on your own model also needs model.reference (--reference)"),
        (("data", "prompts"), "a run on your own model also needs data.prompts (--prompts)"),
        (
            ("data", "replay"),
            "replay.gamma is 0.5, but no offline pairs are named: give data.replay (--replay FILE)",
        ),
        (("model", "policy"), "given without model.policy (--policy)"),
    ],
)
def test_what_a_run_on_an_own_model_needs(left_out: tuple[str, str], message: str) -> None:
    section, key = left_out
    given = {name: {k: v for k, v in values.items() if (name, k) != left_out} for name, values in OWN.items()}
    with pytest.raises(UsageError) as caught:
        resolve([], [], given)
    assert message in str(caught.value)
    assert section in str(caught.value)
    assert key in str(caught.value)


def test_no_offline_pairs_are_needed_without_replay() -> None:
    given = {"model": OWN["model"], "data": {"prompts": "prompts.jsonl"}}
    assert resolve([], ["replay.gamma=0"], given).data.replay is None


@pytest.mark.parametrize("given", [{}, OWN, {**OWN, "train": {"lora": {"r": 4}, "learning_rate": 3.3e-7}}])
def test_a_stored_config_is_read_back_equal(tmp_path: Path, given: dict[str, object]) -> None:
    config = resolve([], ["seed=7", "mine.alpha=0.0031"], given)
    path = tmp_path / "config.yaml"
    path.write_text(dump(config), encoding="utf-8")
    assert load_resolved(path) == config
    assert dump(load_resolved(path)) == dump(config)


def test_a_stored_config_is_used_unchanged(tmp_path: Path) -> None:
    # The world's defaults may change with a version; a run keeps those it started with.
    path = tmp_path / "config.yaml"
    path.write_text("generate: {samples: 5}\n", encoding="utf-8")
    assert load_resolved(path).generate.samples == 5
    assert load_resolved(path).train.learning_rate == RunConfig().train.learning_rate
    path.write_text("generate: {sample: 5}\n", encoding="utf-8")
    with pytest.raises(UsageError, match=f"{path}: unknown key 'generate.sample'.*'generate.samples'"):
        load_resolved(path)


def test_every_key_is_in_the_dump() -> None:
    names = known_keys()
    assert len(names) == len(set(names))
    assert {"rounds", "generate.vllm.kv_cache_gib", "train.lora.r", "replay.gamma"} <= set(names)
    assert {"replay.buffer.capacity", "replay.buffers.*.share"} <= set(names)
    passed = [name.replace("*", "mine=1") for name in names if name.endswith(".*")]
    assert {"generate.sampling_params.mine=1", "generate.vllm.engine_args.mine=1"} <= set(passed)
    judges = ["reward_model={model: m}", "implicit={policy: p, reference: r}", "openai={base_url: http://h, model: m}"]
    judges.append('function={call: "m:f"}')
    given = [*(f"evaluate.judges.{judge}" for judge in judges), *passed]
    given += ["train.lora.r=4", "replay.buffer.capacity=9", "replay.buffers.mine.path=pairs.jsonl"]
    stored = resolve([], given, OWN).model_dump(mode="json")
    for name in names:
        value = stored
        for part in name.replace("*", "mine").split("."):
            assert part in value
            value = value[part]


# Mining

OPTIONS = MiningOptions().model_dump()


def test_keywords_of_mining_are_the_models_fields() -> None:
    types = {name: field.annotation for name, field in MiningOptions.model_fields.items()}
    assert get_type_hints(MiningKeywords) == types
    for function, others in ((mine_pairs, ["frame", "options"]), (mine_files, ["scored", "out", "options"])):
        parameters = inspect.signature(function).parameters
        keywords = {name: p for name, p in parameters.items() if name in OPTIONS}
        assert {name: p.default for name, p in keywords.items()} == OPTIONS
        assert {name: p.annotation for name, p in keywords.items()} == types
        assert [name for name, p in parameters.items() if p.kind is not p.KEYWORD_ONLY] == others
        assert all(p.kind is not p.VAR_KEYWORD for p in parameters.values())


def test_flags_of_mining_are_the_models_fields() -> None:
    command = get_command(app).commands["mine"]
    params = {param.name: param for param in command.get_params(Context(command))}
    own = {"scored", "out", "compare", "memory", "as_json", "help"}
    assert params.keys() == OPTIONS.keys() | own
    for name, field in MiningOptions.model_fields.items():
        assert params[name].opts == [f"--{name.replace('_', '-')}"]
        assert params[name].default == field.default
        assert params[name].rich_help_panel in PANELS
        assert "`" not in params[name].help
    assert "--debias matched" in params["length_ratio"].help


def test_the_section_mine_has_the_miners_options() -> None:
    config = MineConfig().model_dump()
    columns = {name for name in OPTIONS if name.endswith("_column")}
    own = {"length": "tokens", "drop_duplicates": False, "second_reward": None, "pool_rounds": 1}
    # A run knows its columns and its seeds, and never scores a response of no tokens.
    shared = {name: value for name, value in OPTIONS.items() if name not in columns | {"seed"}}
    assert config == shared | own | {"min_length": 1}
    assert PairOptions.model_fields.keys() == shared.keys()


@pytest.mark.parametrize(
    ("assignments", "changed"),
    [
        ([], {}),
        (["length=chars"], {"length_column": "response_chars"}),
        (["drop_duplicates=true"], {"duplicate_column": "token_ids"}),
        (["second_reward=ref_logp"], {"second_reward_column": "ref_logp"}),
        (["pool_rounds=2", "chosen_from=newest"], {"policy_column": "round", "chosen_from": "newest"}),
        (["debias=matched", "length_ratio=0.1"], {"debias": "matched", "length_ratio": 0.1}),
        (["pairing=all_pairs", "pairs_per_prompt=3"], {"pairing": "all_pairs", "pairs_per_prompt": 3}),
        (["win_rates=true", "label_scale=0.5"], {"win_rates": True, "label_scale": 0.5}),
    ],
)
def test_what_a_run_asks_of_the_miner(assignments: list[str], changed: dict[str, object]) -> None:
    found = resolve([], [f"mine.{text}" for text in assignments], OWN).mine
    assert found.options(7) == MiningOptions(**{"min_length": 1, "seed": 7} | changed)


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["mine.pairing=best"], "mine.pairing: Input should be 'max_min', 'max_random', 'top_bottom'"),
        (["mine.debias=matched"], "mine: debias 'matched' needs one of length_tolerance and length_ratio"),
        (["mine.length_tolerance=3"], "mine: length_tolerance is for debias 'matched', but debias is 'linear'"),
        (["mine.pairs_per_prompt=3"], "mine: pairs_per_prompt is for pairing 'top_bottom' or 'all_pairs'"),
        (["mine.pairing=top_bottom", "mine.top_k=0"], "mine: top_k is 0, but must be 1 or more"),
        (["mine.min_margin_quantile=2"], "mine: min_margin_quantile is 2.0, but must be a number from 0 to 1"),
        (["mine.min_margin=.inf"], "mine.min_margin: Input should be a finite number"),
        (["mine.label_scale=0"], "mine: label_scale is 0.0, but must be a finite number above zero"),
        (["mine.second_reward=reward"], "mine.second_reward: Input should be 'logp', 'ref_logp' or 'previous'"),
        (["mine.pool_rounds=0"], "mine.pool_rounds: Input should be greater than or equal to 1"),
        (
            ["mine.chosen_from=newest"],
            "mine: chosen_from is 'newest', but the candidates are those of one round: set pool_rounds to 2 or more",
        ),
        (["mine.rejected_from=oldest"], "mine: rejected_from is 'oldest', but the candidates are those of one round"),
        (["mine.seed=1"], "unknown key 'mine.seed'; here it is 'seed'"),
    ],
)
def test_mining_options_that_are_refused(assignments: list[str], message: str) -> None:
    assert message in refused(*assignments)
