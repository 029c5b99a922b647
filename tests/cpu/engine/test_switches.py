"""From the environment to which patches are on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma4_turbo.catalogue import BITWISE, CATALOGUE, TOLERANCE
from gemma4_turbo.engine import switches
from gemma4_turbo.engine.switches import Decision, Selection, Switches, read
from tests.cpu.synthetic import alias, record

ALIAS = "SGLANG_GEMMA4_DISABLE_FUSED_ROUTER"
NAMES = st.text("abcdefghijklmnopqrstuvwxyz_0123456789", min_size=1, max_size=12)


def router(environ: dict[str, str], selection: Selection | None = None) -> Decision:
    """The decision about the real catalogue's router."""
    return read(environ, selection).decisions["router"]


def loose(environ: dict[str, str], selection: Selection | None = None) -> Switches:
    """The switches of a patch that is not bit-exact and off by default."""
    patch = record("loose", "m:f", numerics=TOLERANCE, default=False).patch
    return read(environ, selection, [patch])


# One layer after the other, the strongest first: each says the opposite of all the weaker ones.
LAYERS = (
    {"GEMMA4_TURBO": "0"},
    {"GEMMA4_TURBO_ROUTER": "1"},
    {ALIAS: "1"},
)


def test_default_is_the_record_s() -> None:
    """Nothing set: what the record says."""
    assert router({}) == Decision(True, "default")
    assert loose({}).decisions["loose"] == Decision(False, "default")


@pytest.mark.parametrize("strongest", range(len(LAYERS)))
def test_the_stronger_variable_wins(strongest: int) -> None:
    """Master, own variable, alias: each beats all below it, and is named in the reason."""
    layers = LAYERS[strongest:]
    environ = {name: value for layer in layers for name, value in layer.items()}
    ((variable, value),) = layers[0].items()
    assert router(environ, Selection(only=("router",))) == Decision(
        variable == "GEMMA4_TURBO_ROUTER", f"{variable}={value}"
    )


def test_alias_beats_apply() -> None:
    """``SGLANG_GEMMA4_DISABLE_FUSED_ROUTER=0`` means on, even if skipped."""
    assert router({ALIAS: "0"}, Selection(skip=("router",))) == Decision(True, f"{ALIAS}=0")
    assert router({ALIAS: "1"}, Selection(only=("router",))) == Decision(False, f"{ALIAS}=1")


@pytest.mark.parametrize(("value", "on"), [("true", False), ("TRUE", False), ("False", True)])
def test_alias_takes_its_forerunner_s_spelling(value: str, on: bool) -> None:
    """SGLang's own switches are spelled true and false too."""
    assert router({ALIAS: value}).on is on


def test_alias_that_enables() -> None:
    """An alias of the other polarity."""
    patch = record("fast", "m:f", default=False, aliases=(alias("OLD_FAST", disables=False),)).patch
    assert read({"OLD_FAST": "1"}, None, [patch]).decisions["fast"].on
    assert not read({"OLD_FAST": "0"}, None, [patch]).decisions["fast"].on


def test_own_variable_beats_apply() -> None:
    """The environment has the last word in both directions."""
    assert not router({"GEMMA4_TURBO_ROUTER": "0"}, Selection(only=("router",))).on
    assert router({"GEMMA4_TURBO_ROUTER": "1"}, Selection(skip=("router",))).on
    assert router({"GEMMA4_TURBO_ROUTER": "1"}, Selection(only=())).on


def test_master_on_is_only_the_default() -> None:
    """``GEMMA4_TURBO=1`` overrides nothing."""
    assert router({"GEMMA4_TURBO": "1"}).on
    assert not router({"GEMMA4_TURBO": "1", "GEMMA4_TURBO_ROUTER": "0"}).on


def test_skip_beats_only_and_only_beats_profile() -> None:
    """What apply was asked for."""
    assert router({}, Selection(("router",), ("router",))) == Decision(False, "apply(skip=...)")
    assert router({}, Selection(only=())) == Decision(False, "apply(only=...)")
    exact = {"GEMMA4_TURBO_PROFILE": "exact"}
    assert loose(exact, Selection(("loose",))).decisions["loose"] == Decision(
        True, "apply(only=...)"
    )


def test_profile_exact_keeps_the_bit_exact_ones() -> None:
    """The profile beats the default, and says why."""
    exact = {"GEMMA4_TURBO_PROFILE": "exact"}
    patches = [
        record("tight", "m:f", numerics=BITWISE).patch,
        record("loose", "m:f", numerics=TOLERANCE).patch,
    ]
    decisions = read(exact, None, patches).decisions
    assert decisions["tight"].on
    assert not decisions["loose"].on
    assert "GEMMA4_TURBO_PROFILE=exact" in decisions["loose"].reason
    assert all(
        d.on for d in read({"GEMMA4_TURBO_PROFILE": "all"}, None, patches).decisions.values()
    )


@pytest.mark.parametrize(
    ("variable", "choices"),
    [
        ("GEMMA4_TURBO", switches.ON_OFF),
        ("GEMMA4_TURBO_ROUTER", switches.ON_OFF),
        ("GEMMA4_TURBO_PROFILE", switches.PROFILES),
        (ALIAS, switches.TRUE_FALSE),
    ],
)
def test_a_bad_value_switches_off_what_it_speaks_of(
    variable: str, choices: tuple[str, ...]
) -> None:
    """One sentence that names the variable, the value and the choices; the router stays off."""
    found = read({variable: "maybe"})
    (problem,) = found.problems
    assert problem == f"{variable}='maybe' is not one of {', '.join(choices)}"
    assert found.decisions["router"] == Decision(False, problem)
    assert found.strict is False


def test_a_bad_log_level_speaks_of_no_patch() -> None:
    """It is a problem, but no patch is less trusted for it."""
    found = read({"GEMMA4_TURBO_LOG": "loud"})
    assert found.problems == ("GEMMA4_TURBO_LOG='loud' is not one of debug, info, warning, error",)
    assert found.log_level is None
    assert found.decisions["router"].on


def test_a_bad_own_variable_leaves_the_other_patches_alone() -> None:
    """Only what it speaks of."""
    patches = [record("one", "m:f").patch, record("two", "m:g").patch]
    decisions = read({"GEMMA4_TURBO_ONE": "yes"}, None, patches).decisions
    assert not decisions["one"].on
    assert decisions["two"].on


def test_every_bad_value_is_told_at_once() -> None:
    """Nobody has to start a server once per mistake."""
    environ = {"GEMMA4_TURBO_ROUTER": "on", "GEMMA4_TURBO_PROFILE": "fast", ALIAS: "maybe"}
    assert [p.partition("=")[0] for p in read(environ).problems] == [
        "GEMMA4_TURBO_PROFILE",
        "GEMMA4_TURBO_ROUTER",
        ALIAS,
    ]


@pytest.mark.parametrize(
    "variable",
    [
        "GEMMA4_TURBO",
        "GEMMA4_TURBO_ROUTER",
        "GEMMA4_TURBO_PROFILE",
        "GEMMA4_TURBO_STRICT",
        "GEMMA4_TURBO_LOG",
        ALIAS,
    ],
)
@pytest.mark.parametrize("value", ["", "  "])
def test_empty_counts_as_unset(variable: str, value: str) -> None:
    """``VAR= python ...`` is how shells unset."""
    assert read({variable: value}) == read({})


@pytest.mark.parametrize(
    ("value", "strict"), [("1", True), (" 1 ", True), ("0", False), ("yes", True)]
)
def test_strict_that_cannot_be_read_is_strict(value: str, strict: bool) -> None:
    """Someone who writes STRICT=yes means it."""
    found = read({"GEMMA4_TURBO_STRICT": value})
    assert found.strict is strict
    assert bool(found.problems) is (value == "yes")


def test_log_level_in_any_case() -> None:
    """``DEBUG`` is ``debug``."""
    assert read({"GEMMA4_TURBO_LOG": "DEBUG"}).log_level == "debug"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("GEMMA4_TURBO_ROUTR", "GEMMA4_TURBO_ROUTER"),
        ("GEMMA4_TURBO_STRCT", "GEMMA4_TURBO_STRICT"),
        ("GEMMA4_TURBO_PROFIL", "GEMMA4_TURBO_PROFILE"),
        ("GEMMA4_TURBO_", "GEMMA4_TURBO"),
        ("GEMMA4TURBO_ROUTER", "GEMMA4_TURBO_ROUTER"),
        ("GEMMA4TURBO", "GEMMA4_TURBO"),
        ("GEMMA4_TURBOO", "GEMMA4_TURBO"),
        ("gemma4_turbo_router", "GEMMA4_TURBO_ROUTER"),
        ("gemma4_turbo_routr", "GEMMA4_TURBO_ROUTER"),
        ("Gemma4_Turbo_Router", "GEMMA4_TURBO_ROUTER"),
        ("GEMMA_4_TURBO_ROUTER", "GEMMA4_TURBO_ROUTER"),
        ("GEMMA4-TURBO-ROUTER", "GEMMA4_TURBO_ROUTER"),
        ("GEMMA4_TURBOROUTER", "GEMMA4_TURBO_ROUTER"),
        ("GEMMA4_TURBOROUTR", "GEMMA4_TURBO_ROUTER"),
        ("GEMA4_TURBO_ROUTER", "GEMMA4_TURBO_ROUTER"),
        ("GEMA4_TURBO", "GEMMA4_TURBO"),
        ("GEMMA_TURBO_STRICT", "GEMMA4_TURBO_STRICT"),
        ("GEMMA4_TRUBO_STRICT", "GEMMA4_TURBO_STRICT"),
        ("GEMMA4_TURB_STRICT", "GEMMA4_TURBO_STRICT"),
        ("EMMA4_TURBO_MOE_ALIGN", "GEMMA4_TURBO_MOE_ALIGN"),
        ("_GEMMA4_TURBO_MOE_ALIGN", "GEMMA4_TURBO_MOE_ALIGN"),
        ("GEMMA4_TURBO_ENV_ROUTER", "GEMMA4_TURBO_ROUTER"),
    ],
)
def test_a_misspelt_variable_is_told_with_the_likely_one(typed: str, meant: str) -> None:
    """A typo would otherwise be a switch that silently does nothing."""
    assert read({typed: "0"}).problems == (
        f"{typed} is no variable of gemma4_turbo; did you mean {meant}?",
    )


def test_an_unknown_variable_like_no_other() -> None:
    """No guess where there is none to make; other projects' variables are none of ours."""
    (problem,) = read({"GEMMA4_TURBO_" + "Q" * 30: "0", "GEMMA4": "1", "SGLANG_X": "1"}).problems
    assert "is no variable of gemma4_turbo" in problem
    assert "did you mean" not in problem


@pytest.mark.parametrize(
    "variable",
    [
        *("GEMMA4", "GEMMA4_MODEL", "GEMMA_HOME", "GEMMA4_ROUTER", "GEMMA4_MOE_CONFIGS"),
        *("GEMMA4_TOP", "GEMMA4_TURN", "GEMMA4_TURBOCHARGER", "GEMMA4TURBO_URL", "GEMMA3_TURBO"),
        *("gemma4_turbo_home", "GEM_HOME", "TURBO_TOKEN", "VLLM_GEMMA4_TURBO_ROUTER", "ROUTER"),
        *("", "=", "G" * 5000),
    ],
)
@pytest.mark.parametrize("value", ["", "0", "1", "/srv/model", "tcp://10.0.0.1:80"])
def test_other_projects_variables_are_none_of_ours(variable: str, value: str) -> None:
    """Strict mode would refuse to start because of them."""
    assert read({variable: value}).problems == ()


def service(name: str, address: str = "10.96.14.3", protocol: str = "tcp") -> dict[str, str]:
    """What Kubernetes puts into every pod for a service with a named port."""
    prefix = name.upper().replace("-", "_")
    url = f"{protocol}://[{address}]:8000" if ":" in address else f"{protocol}://{address}:8000"
    port = f"{prefix}_PORT_8000_{protocol.upper()}"
    return {
        f"{prefix}_SERVICE_HOST": address,
        f"{prefix}_SERVICE_PORT": "8000",
        f"{prefix}_SERVICE_PORT_HTTP_API": "8000",
        f"{prefix}_PORT": url,
        port: url,
        f"{port}_PROTO": protocol,
        f"{port}_PORT": "8000",
        f"{port}_ADDR": address,
    }


LINKED = {
    "GEMMA4_TURBO_NAME": "/web/gemma4-turbo",
    "GEMMA4_TURBO_PORT": "tcp://172.17.0.5:8000",
    "GEMMA4_TURBO_PORT_8000_TCP_START": "tcp://172.17.0.5:8000",
    "GEMMA4_TURBO_PORT_8000_TCP_END": "tcp://172.17.0.5:8009",
    "GEMMA4_TURBO_PORT_8000_TCP_PORT_START": "8000",
    "GEMMA4_TURBO_PORT_8000_TCP_PORT_END": "8009",
    "GEMMA4_TURBO_ENV_PYTHON_VERSION": "3.11.9",
    "GEMMA4_TURBO_ENV_GEMMA4_TURBO_ROUTER": "0",
    "GEMMA4_TURBO_ENV_notes": "two\nlines = 2",
}


@pytest.mark.parametrize(
    "environ",
    [
        service("gemma4-turbo"),
        service("gemma4-turbo-router"),
        service("gemma4turbo"),
        service("gemma-4-turbo-v2"),
        service("gemma4-turbo", "fd00:10:96::a"),
        service("gemma4-turbo", "::1", "sctp"),
        service("gemma4-turbo-dns", protocol="udp"),
        LINKED,
    ],
)
def test_variables_of_a_service_are_none_of_ours(environ: dict[str, str]) -> None:
    """Each of them alone, and all together."""
    assert read(environ).problems == ()
    for variable, value in environ.items():
        assert read({variable: value}).problems == ()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("GEMMA4_TURBO_PORT", "8000"),
        ("GEMMA4_TURBO_PORT", "tcp://somewhere"),
        ("GEMMA4_TURBO_PORT", "http://10.96.14.3:8000"),
        ("GEMMA4_TURBO_SERVICE_HOST", "1"),
        ("GEMMA4_TURBO_SERVICE_PORT", "http"),
        ("GEMMA4_TURBO_PORT_8000_TCP", "1"),
        ("GEMMA4_TURBO_PORT_8000_TCP_PROTO", "udp"),
        ("GEMMA4_TURBO_PORT_8000_TCP_ADDR", "0"),
        ("GEMMA4_TURBO_NAME", "router"),
        ("GEMMA4_TURBO_ENV_ROUTER", "0"),
    ],
)
def test_the_name_of_such_a_variable_alone_is_not_enough(variable: str, value: str) -> None:
    """With a value that no service gives, it is somebody's slip."""
    (problem,) = read({variable: value}).problems
    assert problem.startswith(f"{variable} is no variable of gemma4_turbo")


def test_the_package_s_own_variables_are_known() -> None:
    """Those for the state folder and the selection, and one per patch."""
    environ = {switches.STATE_DIR: "x", switches.SELECTION: Selection().encode()}
    environ |= {patch.env: "1" for patch in CATALOGUE}
    assert read(environ).problems == ()


@given(
    st.builds(
        Selection,
        st.none() | st.lists(NAMES).map(tuple),
        st.lists(NAMES).map(tuple),
        st.just(False),
    )
    | st.just(Selection(reverted=True))
)
def test_selection_round_trip(selection: Selection) -> None:
    """What apply was asked for reaches spawned processes unchanged."""
    assert Selection.decode(selection.encode()) == selection


@given(st.text())
def test_unreadable_selection_never_raises(value: str) -> None:
    """It comes from the environment, where anybody may have written."""
    assert isinstance(Selection.decode(value), Selection)
    if "=" not in value and value != "reverted":
        assert Selection.decode(value) == Selection()
