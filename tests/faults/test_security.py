"""Who may talk to the Ray cluster: ours asks for a token that nobody else can read, and an open one is warned of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.faults.chaos import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.faults]

SCRIPT = Path(__file__).with_name("security.py")
WRONG = "wrong-token-0123456789abcdef0123456789abcdef"

Facts = dict[str, Any]


@dataclass(frozen=True)
class Seen:
    """What came of a cluster that the package started, and of those who tried to attach to it meanwhile."""

    facts: Facts
    token: str
    text: str
    """All that its driver wrote to standard output and standard error."""
    others: dict[str, Facts]


def start(home: Path, name: str, *arguments: str, **variables: str) -> subprocess.Popen[bytes]:
    """Begin the script, with what it prints in ``home``, and with nothing of this process's own token."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_AUTH", "RAY_ADDRESS"))}
    with (home / f"{name}.out").open("wb") as out, (home / f"{name}.err").open("wb") as err:
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), *arguments],
            env={**kept, "HOME": str(home), **variables},
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=err,
        )


def finish(home: Path, name: str, process: subprocess.Popen[bytes]) -> Facts:
    """Let the script come to its end; the last line that it printed."""
    try:
        process.communicate(timeout=90)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    error = (home / f"{name}.err").read_text()
    if process.returncode != 0:
        return {"failed": error[-3000:]}
    return json.loads((home / f"{name}.out").read_text().splitlines()[-1])


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """A driver trains on a cluster of its own. While that is up, four others try to attach to it, all at once, for Ray
    takes its time to give up."""
    home, elsewhere = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("elsewhere")
    driver = start(home, "own", "own", str(home / "run"))
    others: dict[str, subprocess.Popen[bytes]] = {}
    try:
        out = home / "own.out"
        wait_for(lambda: "address" in out.read_text() or driver.poll() is not None, 60, "the cluster's address")
        address = json.loads(out.read_text().splitlines()[0])["address"]
        others["no token"] = start(elsewhere, "no token", "attach", address)
        others["none found"] = start(elsewhere, "none found", "attach", address, RAY_AUTH_MODE="token")
        wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": WRONG}
        others["wrong token"] = start(elsewhere, "wrong token", "attach", address, **wrong)
        others["right token"] = start(home, "right token", "attach", address, RAY_AUTH_MODE="token")
        found = {
            name: finish(home if name == "right token" else elsewhere, name, process)
            for name, process in others.items()
        }
    finally:
        facts = finish(home, "own", driver)
    token = (home / ".ray" / "auth_token").read_text().strip()
    return Seen(facts, token, out.read_text() + (home / "own.err").read_text(), found)


def test_a_cluster_that_we_start_asks_for_a_token(seen: Seen) -> None:
    """Without any setting; there is nothing to warn of then."""
    assert "failed" not in seen.facts, seen.facts["failed"]
    assert seen.facts["guarded"]
    assert seen.facts["warnings"] == []


def test_closing_ends_the_ray_that_we_started_and_leaves_nothing(seen: Seen) -> None:
    """No process, no file in the scratch folder; the tables can still be read."""
    assert seen.facts["num_processes"] > 0
    assert (seen.facts["left"], seen.facts["scratch"], seen.facts["rows"]) == ([], [], 2)


def test_the_token_is_its_owners_alone(seen: Seen) -> None:
    """Ray writes it with the umask's rights, 0644 here."""
    assert seen.facts["rights"] == "0o600"


def test_the_token_is_written_nowhere_else(seen: Seen) -> None:
    """Not to the terminal, not to any log record from DEBUG up, not to any file of the run directory."""
    assert len(seen.token) >= 32
    assert seen.token not in seen.text
    assert seen.facts["num_records"] > 0
    assert not seen.facts["logged"]
    assert seen.facts["num_files"] > 10
    assert seen.facts["in_files"] == []


def test_who_has_the_token_is_let_in(seen: Seen) -> None:
    """And is warned of nothing."""
    other = seen.others["right token"]
    assert "failed" not in other, other["failed"]
    assert (other["error"], other["warnings"]) == ("", [])


@pytest.mark.parametrize("who", ["no token", "none found", "wrong token"])
def test_who_has_not_got_it_is_refused_and_told_where_to_put_it(seen: Seen, who: str) -> None:
    """A driver that uses no token; one that is to use one and finds none; one with another cluster's."""
    other = seen.others[who]
    assert "failed" not in other, other["failed"]
    assert "Where it asks for a token, set RAY_AUTH_MODE=token and give it (RAY_AUTH_TOKEN," in other["error"]
    assert WRONG not in other["error"]
    assert other["seconds"] < 40


def test_a_cluster_that_asks_for_no_token_is_warned_of_once(tmp_path: Path) -> None:
    """The warning names the risk, and what to do."""
    # The second one keeps the cluster on the loopback address.
    variables = {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    found = finish(tmp_path, "open", start(tmp_path, "open", "unguarded", **variables))
    assert "failed" not in found, found["failed"]
    assert found["error"] == ""
    (warning,) = found["warnings"]
    assert "asks for no token: whoever reaches its ports can run any code on it and read its data" in warning
    assert "Start every node, and this process, with RAY_AUTH_MODE=token" in warning
