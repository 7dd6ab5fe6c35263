"""The commands of docs/security.md are run, in order, and its Python."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from lookalike.__main__ import main
from service.access.rights import RULES
from service.settings import Settings
from tests.processes import serving
from tests.service.harness import make_bundle
from tests.transcripts import blocks

DOCUMENT = (Path(__file__).parents[1] / "docs" / "security.md").read_text()
ADDRESS = "localhost:50051"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl here")
def test_its_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("LOOKALIKE_")]:
        monkeypatch.delenv(name)
    make_bundle(tmp_path / "runs" / "demo" / "bundle", seed=0)
    address = ADDRESS
    with ExitStack() as servers:
        for command in "".join(blocks(DOCUMENT, "sh")).splitlines():
            program, *words = [word.replace(ADDRESS, address) for word in shlex.split(command)]
            if program == "openssl":
                subprocess.run([program, *words], check=True, capture_output=True)
            elif words[-1] == "&":
                assert words[:3] == ["serve", "--bundle", "runs/demo/bundle"]
                (data,) = (Path(words[n + 1]) for n, word in enumerate(words) if word == "--data")
                options = words[words.index("--tls-certificate") : -1]
                _, address = servers.enter_context(
                    serving(Path("runs/demo/bundle"), data, log=Path("log"), options=options)
                )
            else:
                to = words[words.index(">") + 1] if ">" in words else ""
                code = main(words[: words.index(">")] if to else words)
                out, err = capsys.readouterr()
                assert code == 0, f"{command}\n{err}"
                if to:
                    Path(to).write_text(out)
                    assert out.startswith("lk_")
                elif "gallery list" in command:
                    assert "shop-2" in out
        for program in blocks(DOCUMENT, "python"):
            exec(compile(program.replace(ADDRESS, address), "docs/security.md", "exec"), {})
            assert capsys.readouterr().out.strip() == "['shop-2']"
    audited = [json.loads(line) for line in Path("audit.jsonl").read_text().splitlines()]
    assert [(line["caller"], line["resources"]) for line in audited] == [("operator", ["shop-2"])]


def test_it_names_every_reason_of_a_refusal_and_no_unknown_file() -> None:
    from embedding import errors

    for kind in (
        errors.CredentialsMissing,
        errors.CredentialsInvalid,
        errors.ScopeMissing,
        errors.GalleryForbidden,
        errors.RateLimited,
    ):
        assert f"| {kind.reason} |" in DOCUMENT
    for link in re.findall(r"\]\(([^)#]+)", DOCUMENT):
        assert (Path(__file__).parents[1] / "docs" / link).exists()
    scopes = DOCUMENT.partition("| scope | what |")[2].partition("\n\n")[0]
    assert {rule.scope for rule in RULES.values()} == set(re.findall(r"^\| `(\w+)` \|", scopes, flags=re.MULTILINE))


def test_its_settings_of_tokens_have_these_defaults() -> None:
    table = DOCUMENT.partition("| setting | default | |")[2].partition("\n\n")[0]
    told = dict[str, str]()
    for row in table.splitlines()[2:]:
        names, defaults = row.split("|")[1:3]
        values = defaults.split(",") if "," in names else [defaults]
        told |= zip(re.findall(r"`(\w+)`", names), (value.strip(" `") for value in values), strict=True)
    fields = {name: field for name, field in Settings.model_fields.items() if name.startswith("jwt_")}
    assert told.keys() == fields.keys() - {"jwt_keys", "jwt_issuer", "jwt_audience"}
    for name, shown in told.items():
        default = fields[name].default
        assert shown == (
            ", ".join(default) or "none"
            if isinstance(default, tuple)
            else f"{default:g}"
            if isinstance(default, float)
            else default
        ), name
