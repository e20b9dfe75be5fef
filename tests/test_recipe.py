"""Recipes from YAML: what is read, and how every mistake is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.config import Recipe
from halfbyte.errors import RecipeError
from halfbyte.recipe import MAX_BYTES, dump, load_recipe, recipe_from

GOOD = "model: m\ndata:\n  train: [{path: a.jsonl}]\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def error_of(tmp_path: Path, text: str, overrides: list[str] | None = None) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text), overrides or [])
    return str(caught.value).replace(str(tmp_path) + "/", "")


def test_minimal(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    assert recipe.model.name == "m"
    assert recipe.data.train[0].path == "a.jsonl"
    assert recipe.format.kind == "nf4"


@pytest.mark.parametrize(
    ("text", "value"),
    [("2e-4", 2e-4), ("1E-5", 1e-5), ("2.0e-4", 2e-4), (".5", 0.5), ("3", 3.0), ("1_000", 1000.0), ("+1e-3", 1e-3)],
)
def test_numbers(tmp_path: Path, text: str, value: float) -> None:
    assert load_recipe(write(tmp_path, GOOD + f"train: {{lr: {text}}}\n")).train.lr == value
    assert load_recipe(write(tmp_path, GOOD), [f"train.lr={text}"]).train.lr == value


def test_on_and_no_are_words(tmp_path: Path) -> None:
    """YAML 1.1 reads `on` as true and `no` as false."""
    assert load_recipe(write(tmp_path, GOOD + "memory: {recompute: on}\n")).memory.recompute == "on"
    assert load_recipe(write(tmp_path, "model: no\ndata: {train: x}\n")).model.name == "no"


def test_short_forms() -> None:
    recipe = recipe_from({"model": "m", "format": "int8", "data": {"train": "a.jsonl", "eval": ["b.jsonl", {"path": "c.jsonl"}]}})
    assert recipe.format.kind == "int8"
    assert [s.path for s in recipe.data.train] == ["a.jsonl"]
    assert isinstance(recipe.data.eval, list)
    assert [s.path for s in recipe.data.eval] == ["b.jsonl", "c.jsonl"]


def test_all_mistakes_at_once_with_lines(tmp_path: Path) -> None:
    text = GOOD + "adapter:\n  rnak: 8\n  alpha: big\nformat: nf5\nlearning_rate: 1\ntrain: {batch: true, batch: 2}\n"
    assert error_of(tmp_path, text).splitlines() == [
        "6 mistakes in recipe.yaml:",
        "  recipe.yaml:5: unknown key `adapter.rnak`; did you mean `adapter.rank`?",
        "  recipe.yaml:6: `adapter.alpha` must be a number, but is `big`",
        "  recipe.yaml:7: `format` must be one of nf4, fp4, int4, int8, none, but is `nf5`; did you mean `nf4`?",
        "  recipe.yaml:8: unknown key `learning_rate`; it is called `train.lr` here",
        "  recipe.yaml:9: `train.batch` is given twice (first on line 9)",
        "  recipe.yaml:9: `train.batch` must be a whole number, but is true",
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lr: 1\n", "recipe.yaml:4: unknown key `lr`\n  hint: did you mean `train.lr`?"),
        ("zork: 1\n", "recipe.yaml:4: unknown key `zork`\n  hint: known keys here: model, format"),
        ("train: 3\n", "recipe.yaml:4: `train` must be a section of `key: value` lines, but is 3"),
        ("train: {lr: '1'}\n", "recipe.yaml:4: `train.lr` must be a number, but is `1`\n  hint: take away the quotes"),
        ("train:\n  lr:\n", "recipe.yaml:5: `train.lr` must be a number, but is empty"),
        ("train: {lr: -1}\n", "`train.lr` must be more than 0, but is -1"),
        ("memory: {microbatch: 0}\n", "`memory.microbatch` must be at least 1, or auto, but is 0"),
        ("memory: {microbatch: x}\n", "`memory.microbatch` must be a whole number, or auto, but is `x`"),
        ("memory: {microbatch: 3}\n", "recipe.yaml:4: `memory.microbatch`: 3 rows do not divide the 8 rows of `train.batch`"),
        ("adapter: {kind: none}\n", "`format`: full fine-tuning (`adapter.kind: none`) trains the base itself: set `format: none`"),
        ("format: {kind: nf4, symmetric: false}\n", "`format.symmetric`: only int4 has zero points"),
        ("log: {to: [wandbb]}\n", "`log.to.0` must be one of tensorboard, wandb, but is `wandbb`\n  hint: did you mean `wandb`?"),
        ("output: ''\n", "`output` must be not empty"),
        ("a: &x 1\nb: *x\n", "recipe.yaml:5: aliases (`*x`) are not allowed"),
        ("a: [\n", "not valid YAML"),
        ("a: !!python/object/apply:os.system [x]\n", "not valid YAML"),
        ("\ta: 1\n", "indent with spaces"),
        ("a: !!int two\n", "not valid YAML: `two` is not int"),
        ("a: !!bool two\n", "not valid YAML: `two` is not bool"),
        (f"a: {'9' * 5000}\n", "not valid YAML: `9999"),
        (f"a: {'[' * 3000}\n", "brackets nested too deeply"),
    ],
)
def test_single_mistakes(tmp_path: Path, text: str, told: str) -> None:
    assert told in error_of(tmp_path, GOOD + text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "recipe.yaml is empty"),
        ("- 1\n", "recipe.yaml:1: expected a list of `key: value` lines"),
        ("model: m\n", "recipe.yaml: `data` is missing"),
        ("data: {train: []}\nmodel: m\n", "recipe.yaml:1: `data.train` must be a list with at least one entry"),
        ("data:\n  train:\n  - weight: 2\nmodel: m\n", "recipe.yaml:3: `data.train.0.path` is missing"),
        ("data: {train: a, eval: [{path: b, weight: 2}]}\nmodel: m\n", "`data.eval`: a held-out source has no `weight`"),
        ("data: {train: a, eval: 1.5}\nmodel: m\n", "`data.eval` must be less than 1, or a whole number, or a list, but is 1.5"),
    ],
)
def test_whole_files(tmp_path: Path, text: str, told: str) -> None:
    assert told in error_of(tmp_path, text)


def test_not_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "chat.yaml").write_text(GOOD)
    with pytest.raises(RecipeError, match=r"there is no recipe .*\n  hint: recipes there: chat.yaml"):
        load_recipe(tmp_path / "chta.yaml")
    with pytest.raises(RecipeError, match="there is no recipe"):
        load_recipe("a" * 300)
    with pytest.raises(RecipeError, match="is not a file"):
        load_recipe(tmp_path)
    big = write(tmp_path, GOOD + "#" * MAX_BYTES)
    with pytest.raises(RecipeError, match="larger than"):
        load_recipe(big)
    big.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(big)


def test_overrides(tmp_path: Path) -> None:
    changes = ["train.lr=1e-4", "data.train.0.weight=2", "model.revision=abc", "format.block=128", "train.prompts=[a, b]"]
    recipe = load_recipe(write(tmp_path, GOOD), changes)
    assert (recipe.train.lr, recipe.data.train[0].weight, recipe.format.block) == (1e-4, 2.0, 128)
    assert (recipe.model.name, recipe.model.revision, recipe.train.prompts) == ("m", "abc", ["a", "b"])


def test_prompts_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "ask.txt").write_text("\ufeffWhat is it?\n\n  Why é?  \n", encoding="utf-8")
    recipe = load_recipe(write(tmp_path, GOOD), [f"train.prompts={tmp_path / 'ask.txt'}"])
    assert recipe.train.prompts == ["What is it?", "Why é?"]
    with pytest.raises(RecipeError, match=r"nothing\.txt` is not a text file with one question a line \(FileNotFoundError\)"):
        load_recipe(write(tmp_path, GOOD), ["train.prompts=nothing.txt"])


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.l=1", "override `train.l=1`: unknown key `train.l`"),
        ("train.lr=zz", "override `train.lr=zz`: `train.lr` must be a number, but is `zz`"),
        ("train.lr", "override `train.lr` is not of the form key=value"),
        ("data.train.5.weight=2", "override `data.train.5.weight=2`: there is no `data.train.5.weight`"),
        ("train.lr=[", "override `train.lr=[`: the value is not valid YAML"),
        (f"train.lr={'[' * 3000}", "the value is not valid YAML"),
        ("train.lr=!!int two", "the value is not valid YAML"),
        ("data.prain.0.weight=2", "unknown key `data.prain`"),
        ("data.train.²=2", "`data.train.²`"),
    ],
)
def test_wrong_overrides(tmp_path: Path, override: str, told: str) -> None:
    assert told in error_of(tmp_path, GOOD, [override])


def test_the_callers_dict_is_not_changed() -> None:
    data = {"model": "m", "data": {"train": [{"path": "a"}]}}
    recipe_from(data, ["data.train.0.path=b"])
    assert data == {"model": "m", "data": {"train": [{"path": "a"}]}}


def test_recipe_from_python_tells_in_words() -> None:
    with pytest.raises(RecipeError, match=r"unknown key `rnak`.*`data` is missing|`data` is missing.*unknown key `rnak`"):
        Recipe(model="m", rnak=1)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int4", "int8", "none"])
def test_resolved_recipe_reads_back(tmp_path: Path, kind: str) -> None:
    recipe = recipe_from({"model": "m", "format": kind, "data": {"train": "ü.jsonl"}}, ["optim.eps=1e-9"])
    assert load_recipe(write(tmp_path, dump(recipe))) == recipe


@pytest.mark.parametrize("measure", [{"weight": 0.5}, {"count": 3}, {"share": 0.1}], ids=lambda m: next(iter(m)))
def test_how_much_of_a_source_reads_back(tmp_path: Path, measure: dict[str, float]) -> None:
    recipe = recipe_from({"model": "m", "data": {"train": ["a.jsonl", {"path": "b.jsonl", **measure}]}})
    assert load_recipe(write(tmp_path, dump(recipe))) == recipe
    both = {"weight": 0.5, "count": 3, "share": 0.1} | measure
    with pytest.raises(RecipeError, match="`weight` and `count` and `share` are two answers to one question"):
        recipe_from({"model": "m", "data": {"train": [{"path": "b.jsonl", **both}]}})


@given(st.text(max_size=60))
def test_any_text_is_a_recipe_or_an_error(text: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "r.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(RecipeError):
            load_recipe(path)


@pytest.mark.parametrize(("name", "bits"), [("paged_adamw", 32), ("paged_adamw_32bit", 32), ("paged_adamw_8bit", 8)])
def test_paged_optimizers_of_other_tools_are_understood(tmp_path: Path, name: str, bits: int) -> None:
    for text in (f"optim: {name}\n", f"optim: {{kind: {name}}}\n"):
        found = load_recipe(write(tmp_path, GOOD + text)).optim
        assert (found.kind, found.bits, found.paged) == ("adamw", bits, "auto")
        assert found.understood() == f"optim: {name} is adamw with bits: {bits} and paged: auto here"
    assert load_recipe(write(tmp_path, GOOD)).optim.understood() == ""
    other = 40 - bits
    with pytest.raises(RecipeError, match=rf"{name} has moments of {bits} bits, and `optim.bits` is {other}"):
        load_recipe(write(tmp_path, GOOD + f"optim: {{kind: {name}, bits: {other}}}\n"))
