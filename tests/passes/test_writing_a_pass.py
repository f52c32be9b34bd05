import contextlib
import io
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: Path) -> list[tuple[str, str]]:
    """The fenced blocks of the page: (language, text)."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    return [(language, text) for language, text in found]


@pytest.mark.parametrize("name", ["writing-a-pass.md", "why-torch-fx.md"])
def test_the_code_of_the_page_runs_and_prints_what_it_says(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "page"}
    printed = ""
    languages = []
    for language, text in blocks(DOCS / name):
        languages.append(language)
        if language == "python":
            assert not printed, "every output is shown"
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile(text, name, "exec"), namespace)
            printed = output.getvalue()
        else:
            assert (language, text) == ("text", printed)
            printed = ""
    assert languages.count("python") >= 2
    assert languages.count("text") >= 2
    assert not list(tmp_path.iterdir())
