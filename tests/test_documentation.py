"""Code in the documentation runs, its commands are read, its links lead somewhere, its site builds."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import re
import shlex
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from polopt.cli import options
from polopt.cli.main import COMMANDS, main
from polopt.compare.plan import parse_contender
from polopt.core import registry
from polopt.core.override import override
from polopt.core.part import SLOTS, named_parts
from polopt.methods import get_method, methods
from scripts.docs import figures, pages, prose
from scripts.docs.build import build
from scripts.docs.stage import UNWRITTEN, stage

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
by_name = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("staged")
    stage(folder, figures=False)
    return folder / "pages"


# --- code -----------------------------------------------------------------------------------------------------------


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def run(*code: str, **names: Any) -> dict[str, Any]:
    module = sys.modules["documented"] = types.ModuleType("documented")
    module.__dict__.update(names)
    for part in code:
        exec(compile(part, "documented", "exec"), module.__dict__)
    return module.__dict__


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    before = {slot: dict(named_parts(slot)) for slot in SLOTS}
    yield
    for slot in SLOTS:
        for name in set(named_parts(slot)) - set(before[slot]):
            named_parts(slot).pop(name)  # type: ignore[attr-defined]


def test_the_readme_s_method_is_the_one_in_its_file(own_registry: None) -> None:
    file = importlib.import_module("polopt.methods.base.dr_grpo")
    written = get_method("dr-grpo").slots()
    registry._METHODS.pop("dr-grpo")
    made = run(blocks(ROOT / "README.md")[0], **{k: v for k, v in vars(file).items() if not k.startswith("__")})
    assert made["dr_grpo"].slots() == written


def test_the_readme_s_mathematics_runs_in_any_trainer() -> None:
    torch.manual_seed(0)
    found = run(blocks(ROOT / "README.md")[1])
    slope = found["logp"].grad
    # GSPO at ratio 1 is -A_i / (M |y_i|); the z-score of (1, 0) is +-1/sqrt(2), and the padding gets nothing.
    assert torch.allclose(slope[0], torch.full((3,), -(0.5**0.5) / 6), atol=1e-4)
    assert torch.allclose(slope[1], torch.tensor([0.5**0.5 / 4, 0.5**0.5 / 4, 0.0]), atol=1e-4)


def test_the_documented_method_is_a_method(own_registry: None) -> None:
    found = run(blocks(ROOT / "docs" / "methods.md")[0])
    assert found["max_baseline"].advantage.scale == 1.0


def test_the_guide_s_run_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    from polopt.training import run as training

    monkeypatch.setattr(training, "train", lambda config: config)
    config = run(*blocks(ROOT / "docs" / "guide.md"))["summary"]
    assert override(get_method(config.method), config.slots).reward.beta == 0.0


@pytest.mark.parametrize("name", ["concepts.md", "diagnose.md", "compare.md", "claims.md", "leaderboard.md"])
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = ROOT / "docs" / name
    if not page.is_file():
        pytest.skip(f"docs/{name} is not written yet")
    monkeypatch.chdir(tmp_path)
    run(*blocks(page))


def test_every_page_with_code_is_run_here() -> None:
    run_here = {"README.md", "methods.md", "guide.md", "concepts.md", "in_your_trainer.md", *UNWRITTEN}
    assert {page.name for page in PAGES if blocks(page)} <= run_here


def test_the_loop_of_one_s_own_learns() -> None:
    rewards = run(blocks(ROOT / "docs" / "in_your_trainer.md")[0])["rewards"]
    assert sum(rewards[:3]) / 3 < 0.7 < 0.9 < sum(rewards[-5:]) / 5


def test_trl_s_trainer_takes_a_method(tmp_path: Path) -> None:
    """With the method that TRL's loss is an instance of, the subclass trains to TRL's own weights."""
    trl = pytest.importorskip("trl", reason="the subclass is of TRL's trainer")
    _, subclass, example = blocks(ROOT / "docs" / "in_your_trainer.md")
    found = run(subclass, example)
    assert found["trainer"].state.global_step == 2

    def train(trainer: type, loss_type: str, **more: Any) -> dict[str, torch.Tensor]:
        arguments = trl.GRPOConfig(
            output_dir=str(tmp_path / trainer.__name__),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            num_generations=4,
            num_iterations=2,
            max_completion_length=6,
            max_steps=3,
            learning_rate=1e-3,
            loss_type=loss_type,
            scale_rewards="none" if loss_type == "dr_grpo" else "group",
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            seed=3,
        )
        made: Any = trainer(
            model=str(found["base_policy_path"]()),
            reward_funcs=lambda completions, **columns: [float(sum(map(ord, text)) % 7) for text in completions],
            train_dataset=found["Dataset"].from_list([{"prompt": f"{a}+{a}="} for a in range(8)]),
            args=arguments,
            **more,
        )
        made.train()
        return {name: value.detach().clone() for name, value in made.model.named_parameters()}

    start = dict(type(found["trainer"].model).from_pretrained(found["base_policy_path"]()).named_parameters())
    for slug, loss_type in (("grpo", "grpo"), ("dr-grpo", "dr_grpo")):
        theirs = train(trl.GRPOTrainer, loss_type)
        ours = train(found["PoloptTrainer"], loss_type, method=get_method(slug))
        assert any(not torch.equal(theirs[name], start[name]) for name in theirs)
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=0, atol=2e-6)


# --- commands -------------------------------------------------------------------------------------------------------


class Read(Exception):
    """Stops a command once its options have been read."""


def commands(text: str) -> list[str]:
    """Command lines of code blocks, and of inline code without a placeholder in capitals."""
    blocks = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    fenced = [block for language, block in blocks if language in ("bash", "sh", "console", "")]
    rest = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    indented = re.findall(r"^    (.+)$", rest, re.MULTILINE)
    lines = [
        *"\n".join(fenced).replace("\\\n", " ").splitlines(),
        *"\n".join(indented).replace("\\\n", " ").splitlines(),
    ]
    # Two commands beside each other in one line, each with its comment.
    parts = [re.sub(r"\s#.*", "", part) for line in lines for part in re.split(r"(?:^|\s{2,})(?=polopt )", line)]
    inline = re.findall(r"`(polopt [^`]+)`", rest)
    found = [" ".join(part.split()) for part in parts if part.strip().startswith("polopt ")]
    return found + [line for line in inline if not re.search(r"\b[A-Z]{2,}\b|\.\.\.|…", line)]


def read(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the command line read a command without running it; slots and fields must exist in its method."""
    name, *arguments = shlex.split(command)[1:]
    assert name in COMMANDS, f"{command!r}: there is no command {name!r}"
    module = importlib.import_module(COMMANDS[name].module)
    slots: dict[str, str] = {}
    positional: list[Any] = []

    def split(*given: Any, **named: Any) -> Any:
        own, names, found = options.split(*given, **named)
        slots.update(found)
        return own, names, found

    def parse(*given: Any, **named: Any) -> Any:
        made = options.parse(*given, **named)
        slots.update(made.slots)
        positional.append(made.positional)
        raise Read

    monkeypatch.setattr(module, "parse", parse)
    if hasattr(module, "split"):
        monkeypatch.setattr(module, "split", split)
    if "--help" in arguments:
        with pytest.raises(SystemExit):
            COMMANDS[name](arguments)
        return
    with pytest.raises(Read):
        COMMANDS[name](arguments)
    if name in ("train", "show", "diagnose", "compare", "claim") and positional[0] is not None:
        for given in [positional[0]] if isinstance(positional[0], str) else positional[0]:
            if name == "compare":
                parse_contender(given, slots)
            else:
                override(get_method(given), slots)


@by_name
def test_commands_are_read(
    page: Path, own_registry: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # The method that a page tells how to write, as files of the reader's own.
    text = blocks(ROOT / "docs" / "methods.md")[0]
    (tmp_path / "max_baseline.py").write_text(text, encoding="utf-8")
    (tmp_path / "mine.py").write_text(text.replace("max-baseline", "mine"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    if page.name == "methods.md":
        get_method("max_baseline.py")
    for command in commands(page.read_text(encoding="utf-8")):
        read(command, monkeypatch)


def test_commands_of_generated_pages_are_read(
    staged: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {
        c for folder in ("methods", "parts") for p in (staged / folder).glob("*.md") for c in commands(p.read_text())
    }
    assert {f"polopt train {slug}" for slug in methods()} <= found
    for command in sorted(found):
        read(command, monkeypatch)


def test_wrong_commands_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert commands(
        "    polopt train grpo \\\n        --steps 3   # why\n\n`polopt show ppo` and `polopt train METHOD`\n"
    ) == [
        "polopt train grpo --steps 3",
        "polopt show ppo",
    ]
    assert commands("```python\nx\n```\n\n```bash\npolopt eval\n```\n\n```\npolopt parts\n```\n") == [
        "polopt eval",
        "polopt parts",
    ]
    for wrong in ("polopt train grpo --stepz 3", "polopt train grpo --objective.hihg 1", "polopt trian grpo"):
        with pytest.raises((ValueError, AssertionError)):
            read(wrong, monkeypatch)


# --- links ----------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return {prose.anchor(re.sub(r"[`*\\]", "", line)) for line in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


def check_links(page: Path, standing_in: Mapping[str, str]) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target, fragment in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", text):
        there = page.parent / target if target else page
        if not there.exists() and there.parent.name == "docs" and there.name in standing_in:
            continue
        assert there.exists(), f"{page.name} links to {target}, which does not exist"
        if fragment:
            assert fragment in anchors(there), f"{page.name} links to {target}#{fragment}; there are {anchors(there)}"


@by_name
def test_links_lead_to_files_and_headings(page: Path) -> None:
    check_links(page, UNWRITTEN)


def test_links_of_the_staged_pages_lead_to_files_and_headings(staged: Path) -> None:
    for page in staged.rglob("*.md"):
        check_links(page, {})


@by_name
def test_named_files_exist(page: Path) -> None:
    for name in re.findall(r"`(polopt/[\w/.]+\.py)`", page.read_text(encoding="utf-8")):
        assert (ROOT / name).is_file(), f"{page.name} names {name}, which does not exist"


# --- generated pages ------------------------------------------------------------------------------------------------


def shipped() -> list[str]:
    return sorted(slug for slug, method in methods().items() if method.family != "user")


def test_every_method_has_a_page_with_its_facts(staged: Path) -> None:
    index = (staged / "methods" / "index.md").read_text(encoding="utf-8")
    for slug in shipped():
        method = get_method(slug)
        page = (staged / "methods" / f"{slug}.md").read_text(encoding="utf-8")
        assert f"({slug}.md)" in index
        for column in method.needs | method.evaluates:
            assert f"`{column}`" in page
        source = (ROOT / pages.source_of(method)).read_text(encoding="utf-8")
        assert source.rstrip() in page
        assert (staged / "source" / f"{slug.replace('-', '_')}.py").read_text(encoding="utf-8") == source
        for slot, value in method.slots().items():
            assert f"(../parts/{slot}.md" in page
            own = dataclasses.fields(value) if dataclasses.is_dataclass(value) and getattr(value, "name", "") else ()
            for field in own:
                if field.init and field.name not in value.state:
                    assert f"`--{slot}.{field.name.replace('_', '-')}`" in page


def test_every_named_part_is_on_its_slot_s_page(staged: Path) -> None:
    for slot in SLOTS:
        page = (staged / "parts" / f"{slot}.md").read_text(encoding="utf-8")
        for name in named_parts(slot):
            assert f"\n## {name}\n" in page


def plain(markdown: str) -> str:
    """Markdown's words without its marks."""
    bare = re.sub(r"^```\w*$", "", markdown, flags=re.MULTILINE)
    bare = re.sub(r"\[(arXiv:[\d.]+)\]\([^)]*\)", r"\1", bare)
    bare = re.sub(r"\\([\\*_\[\]|])", r"\1", bare).replace("&lt;", "<").replace("&amp;", "&")
    return " ".join(bare.replace("`", "").split())


@pytest.mark.parametrize("slug", sorted(methods()))
def test_docstrings_lose_no_word(slug: str) -> None:
    doc = get_method(slug).doc
    assert plain(prose.docstring(doc)) == " ".join(doc.replace("`", "").split())


def test_definitions_stand_apart_from_prose() -> None:
    made = prose.docstring("A_i = r_i - b,\n  + c_i * d_i;\nb is the *mean*, b <- 0.\n\n- ``none``: 0\n- one")
    assert made == (
        "```text\nA_i = r_i - b,\n+ c_i * d_i;\n```\n\nb is the \\*mean\\*, b &lt;- 0.\n\n- `none`: 0\n- one"
    )


def test_the_ledger_is_on_the_page(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    entry = {
        "slug": "rloo",
        "verdict": "not reproduced",
        "statement": "less variance | than reinforce",
        "effect": -0.1234567,
        "interval": [-0.3, None],
        "seeds": 10,
        "command": "polopt show rloo",
    }
    ledger.write_text(json.dumps(entry) + "\n", encoding="utf-8")
    page = pages.method_page(get_method("rloo"), pages.read_ledger(ledger)["rloo"], "", "polopt/methods/base/rloo.py")
    assert "**not reproduced**: less variance \\| than reinforce" in page
    assert "| effect | -0.1235 |" in page
    assert "| interval | -0.3, - |" in page
    assert "```bash\npolopt show rloo\n```" in page
    assert pages.read_ledger(tmp_path / "none.jsonl") == {}


def test_a_figure_is_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Sequence[str]] = []

    def draw(arguments: Sequence[str]) -> int:
        drawn.append(arguments)
        Path(arguments[arguments.index("--png") + 1]).write_bytes(b"picture")
        return 0

    monkeypatch.setattr(figures, "main", draw)
    monkeypatch.setitem(COMMANDS, "diagnose", COMMANDS["show"])
    method = get_method("rloo")
    first, again = figures.draw(method, tmp_path), figures.draw(method, tmp_path)
    assert first == again
    assert first[0] is not None and first[0].read_bytes() == b"picture"
    assert len(drawn) == 1
    changed = method | {"advantage": get_method("grpo").advantage}
    new, _ = figures.draw(changed, tmp_path)
    assert len(drawn) == 2
    assert [new] == list(tmp_path.iterdir()), "the figure of before is gone"


def test_a_method_that_cannot_be_diagnosed_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "main", lambda arguments: main(["show", "no-such-method"]))
    monkeypatch.setitem(COMMANDS, "diagnose", COMMANDS["show"])
    picture, why = figures.draw(get_method("rloo"), tmp_path)
    assert picture is None
    assert why.startswith("unknown method 'no-such-method'")
    monkeypatch.delitem(COMMANDS, "diagnose")
    assert figures.draw(get_method("rloo"), tmp_path)[0] is None


# --- the site -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("zensical") is None, reason="`make docs` installs the docs extra")
def test_the_site_builds_and_fetches_nothing(tmp_path: Path) -> None:
    build(tmp_path / "docs", tmp_path / "site", figures=False)
    for name in ("index.html", "concepts.html", "api.html", *(f"methods/{slug}.html" for slug in shipped())):
        assert (tmp_path / "site" / name).is_file()
    assert "group_zscore" in (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    for page in (tmp_path / "site").rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        assert not re.findall(r"""<(?:script|img|iframe|source)[^>]+src=["']?(?:https?:)?//""", html), page
        for link in re.findall(r"<link[^>]+>", html):
            assert 'rel="canonical"' in link or "//" not in link, page
        assert page.name == "404.html" or "javascripts/worker.js" in html
