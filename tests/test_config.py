"""Settings: which source wins and is named, what every mistake is answered with, and that no secret gets out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, SecretStr, ValidationError

from indexer.config import Settings
from indexer.errors import ConfigError
from indexer.settings_fields import known_paths
from indexer.settings_sources import Loaded, load_settings

ABI = "event Played(uint256 id)"
FULL = """
[database]
url = "postgresql://me:pw@db/music"
schema = "plays"
data_dir = "data"
[chain]
name = "poa"
[[chain.endpoints]]
url = "https://node.example/v3/key"
[[contracts]]
name = "plays"
address = "0xaa"
abi = "abi/plays.json"
[[contracts]]
address = ["0xbb", "0xcc"]
abi = ["event Played(uint256 id)"]
[hooks]
enabled = ["hooks.plays:plays"]
[hooks.plays]
retries = 2
beside_writer = true
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(
    toml: str | None = None,
    environ: Mapping[str, str] | None = None,
    secrets: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Loaded:
    if toml is not None:
        Path("indexer.toml").write_text(toml, encoding="utf-8")
    folder = Path("secrets") if secrets is not None else None
    for name, text in (secrets or {}).items():
        Path("secrets").mkdir(exist_ok=True)
        (Path("secrets") / name).write_text(text, encoding="utf-8")
    return load_settings(secrets=folder, environ=environ or {}, overrides=overrides)


def refused(*args: Any, **named: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*args, **named)
    assert "\n" not in str(caught.value)
    assert caught.value.__context__ is None
    return str(caught.value)


class TestSources:
    def test_nothing_given(self) -> None:
        loaded = load()
        assert loaded.settings == Settings()
        assert loaded.origin("database.pool_size") == "default"
        assert loaded.origin("database") == "default"

    def test_settings_alone_read_no_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DATABASE", '{"pool_size": 9}')
        assert Settings().database.pool_size == 6

    def test_each_source_beats_the_next(self) -> None:
        sources: list[dict[str, Any]] = [
            {"toml": "[database]\npool_size = 10\n"},
            {"secrets": {"database__pool_size": "20\n"}},
            {"environ": {"INDEXER_DATABASE__POOL_SIZE": "30"}},
            {"overrides": {"database": {"pool_size": 40}}},
        ]
        origins = [
            "file indexer.toml",
            "secret file database__pool_size",
            "environment INDEXER_DATABASE__POOL_SIZE",
            "command line",
        ]
        arguments: dict[str, Any] = {}
        for number, (source, origin) in enumerate(zip(sources, origins, strict=True), 1):
            arguments |= source
            loaded = load(**arguments)
            assert loaded.settings.database.pool_size == number * 10
            assert loaded.origin("database.pool_size") == origin

    def test_a_section_from_many_sources(self) -> None:
        loaded = load(FULL, {"INDEXER_CHAIN__NAME": "other", "INDEXER_CHAIN__POLL_SECONDS": "0.5"})
        assert (loaded.settings.chain.name, loaded.settings.chain.poll_seconds) == ("other", 0.5)
        assert len(loaded.settings.chain.endpoints) == 1
        assert loaded.origin("chain.endpoints[0].url") == "file indexer.toml"
        assert loaded.origin("chain.confirmations") == "default"
        assert loaded.origin("chain") == (
            "file indexer.toml, environment INDEXER_CHAIN__NAME, environment INDEXER_CHAIN__POLL_SECONDS"
        )

    def test_a_list_replaces_the_whole_list(self) -> None:
        urls = '[{"url": "http://a"}, {"url": "http://b", "name": "second"}]'
        loaded = load(FULL, {"INDEXER_CHAIN__ENDPOINTS": urls})
        assert [one.label for one in loaded.settings.chain.endpoints] == ["a", "second"]
        assert loaded.origin("chain.endpoints[1].name") == "environment INDEXER_CHAIN__ENDPOINTS"

    @pytest.mark.parametrize("text", ["a:b,c:d", " a:b , c:d,", '["a:b", "c:d"]'])
    def test_lists_of_texts(self, text: str) -> None:
        assert load(environ={"INDEXER_HOOKS__ENABLED": text}).settings.hooks.enabled == ["a:b", "c:d"]
        assert load(overrides={"hooks.enabled": text}).settings.hooks.enabled == ["a:b", "c:d"]

    def test_an_empty_list_is_an_answer(self) -> None:
        assert load(FULL, {"INDEXER_HOOKS__ENABLED": ""}).settings.hooks.enabled == []

    def test_a_table_as_json_under_single_variables(self) -> None:
        environ = {"INDEXER_SPAN__MAX_EVENTS": "7", "INDEXER_SPAN": '{"max_events": 1, "max_blocks": 2}'}
        span = load(environ=environ).settings.span
        assert (span.max_events, span.max_blocks) == (7, 2)

    def test_hooks(self) -> None:
        environ = {
            "INDEXER_HOOKS__PLAYS__ON_ERROR": "skip",
            "INDEXER_HOOKS__PLAYS__SKIP_USERS": "[1, 2]",
            "INDEXER_HOOKS__PLAYS__MARK": "[not json",
            "INDEXER_HOOKS__PLAYS__CODE": "0123",
        }
        loaded = load(FULL, environ)
        plays = loaded.settings.hooks.__pydantic_extra__["plays"]
        assert (plays.on_error, plays.retries) == ("skip", 2)
        assert plays.model_extra == {
            "beside_writer": True,
            "skip_users": [1, 2],
            "mark": "[not json",
            "code": "0123",
        }
        assert loaded.origin("hooks.plays.on_error") == "environment INDEXER_HOOKS__PLAYS__ON_ERROR"
        assert loaded.origin("hooks.plays.retries") == "file indexer.toml"

    def test_a_hook_without_settings_of_its_own(self) -> None:
        assert load("[hooks.plays]\n").settings.hooks.__pydantic_extra__["plays"].on_error == "halt"

    def test_overrides_nested_dotted_and_none(self) -> None:
        overrides = {"log": {"level": None, "format": "json"}, "http.port": 0, "database.url": None}
        loaded = load("[log]\nlevel = 'error'\n", overrides=overrides)
        assert (loaded.settings.log.level, loaded.settings.log.format) == ("error", "json")
        assert loaded.settings.http.port == 0
        assert loaded.origin("log.level") == "file indexer.toml"

    def test_one_or_many_addresses_and_both_kinds_of_abi(self, here: Path) -> None:
        first, second = load(FULL).settings.contracts
        assert (first.address, first.abi) == (["0xaa"], here / "abi/plays.json")
        assert (second.address, second.abi) == (["0xbb", "0xcc"], [ABI])


class TestFiles:
    def test_named_by_argument_or_variable(self, here: Path) -> None:
        (here / "indexer.toml").write_text("[http]\nport = 1\n")
        (here / "b.toml").write_text("[http]\nport = 2\n")
        (here / "c.toml").write_text("[http]\nport = 3\n")
        environ = {"INDEXER_CONFIG": "b.toml"}
        assert load_settings(environ={"INDEXER_CONFIG": ""}).settings.http.port == 1
        assert load_settings(environ=environ).origin("http.port") == "file b.toml"
        assert load_settings(Path("c.toml"), environ=environ).origin("http.port") == "file c.toml"

    def test_file_names_are_relative_to_the_file(self, here: Path) -> None:
        (here / "etc").mkdir()
        (here / "etc/x.toml").write_text(FULL)
        settings = load_settings(Path("etc/x.toml"), environ={}).settings
        assert settings.contracts[0].abi == here / "etc/abi/plays.json"
        assert settings.contracts[1].abi == [ABI]
        assert settings.database.data_dir == here / "etc/data"
        environ = {"INDEXER_DATABASE__DATA_DIR": "data"}
        assert load_settings(Path("etc/x.toml"), environ=environ).settings.database.data_dir == Path("data")

    def test_missing(self, here: Path) -> None:
        for arguments in ({"config": Path("no.toml")}, {"environ": {"INDEXER_CONFIG": "no.toml"}}):
            with pytest.raises(ConfigError, match=r"^file no\.toml: there is no such file$"):
                load_settings(**{"environ": {}, **arguments})  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="Is a directory"):
            load_settings(here, environ={})

    @pytest.mark.parametrize(
        ("toml", "text"),
        [
            ("[http]\nport = = 1\n", "file indexer.toml, line 2, column 8: Invalid value"),
            ("[http]\nport = 1\n[http]\n", "file indexer.toml, line 3, column 6: Cannot declare a table twice"),
            ("[http]\nport =", "file indexer.toml, line 2, column 7: Invalid value"),
            ("[database]\nurl = postgres://u:hunter2@h/d\n", "file indexer.toml, line 2, column 7: Invalid value"),
            ('["u:hunter2@h"]\n["u:hunter2@h"]\n', "line 2, column 15: Cannot declare a table twice"),
        ],
    )
    def test_invalid_toml(self, toml: str, text: str) -> None:
        answer = refused(toml)
        assert text in answer
        assert "hunter2" not in answer

    def test_not_utf8(self, here: Path) -> None:
        (here / "indexer.toml").write_bytes(b"[http] # hunter2 \xff\n")
        assert refused() == "file indexer.toml: is not UTF-8"


class TestSecretsFolder:
    def test_names_and_content(self) -> None:
        secrets = {"DATABASE__URL": "postgres://a b\n".replace(" ", ""), "indexer_http__Admin_Token": " t \r\n"}
        loaded = load(secrets=secrets)
        assert loaded.settings.database.url == SecretStr("postgres://ab")
        assert loaded.settings.http.admin_token == SecretStr(" t ")
        assert loaded.origin("database.url") == "secret file DATABASE__URL"

    def test_a_list_of_endpoints(self) -> None:
        loaded = load(FULL, secrets={"chain__endpoints": '[{"url": "http://n/key"}]\n'})
        assert loaded.settings.chain.endpoints[0].label == "n"

    def test_which_folder(self, here: Path) -> None:
        for folder, port in (("a", "1"), ("b", "2"), ("c", "3")):
            (here / folder).mkdir()
            (here / folder / "http__port").write_text(port)
        environ = {"CREDENTIALS_DIRECTORY": "c"}
        assert load_settings(environ=environ).settings.http.port == 3
        environ["INDEXER_SECRETS_DIR"] = "b"
        assert load_settings(environ=environ).settings.http.port == 2
        assert load_settings(secrets=here / "a", environ=environ).settings.http.port == 1

    def test_unknown_files(self, here: Path) -> None:
        (here / "secrets").mkdir()
        (here / "secrets/..data").mkdir()
        (here / "secrets/.hidden").write_text("x")
        assert load_settings(secrets=here / "secrets", environ={}).settings == Settings()
        (here / "secrets/tls.key").write_text("hunter2")
        assert load_settings(environ={"CREDENTIALS_DIRECTORY": "secrets"}).settings == Settings()
        assert "is no setting (secret file tls.key)" in refused(secrets={})
        (here / "secrets/database__uri").write_text("hunter2")
        with pytest.raises(ConfigError, match=r"^database\.uri is no setting, did you mean url\? \(secret file dat"):
            load_settings(environ={"CREDENTIALS_DIRECTORY": "secrets"})

    def test_missing_folder(self) -> None:
        assert load_settings(environ={"CREDENTIALS_DIRECTORY": "none"}).settings == Settings()
        for arguments in ({"secrets": Path("none")}, {"environ": {"INDEXER_SECRETS_DIR": "none"}}):
            with pytest.raises(ConfigError, match=r"^secrets folder none: there is no such folder$"):
                load_settings(**{"environ": {}, **arguments})  # type: ignore[arg-type]

    def test_not_utf8(self, here: Path) -> None:
        (here / "secrets").mkdir()
        (here / "secrets/database__url").write_bytes(b"hunter2\xff")
        assert refused(secrets={}) == "secret file secrets/database__url: is not UTF-8"


FILE = "(file indexer.toml)"
ENDPOINT = '[[chain.endpoints]]\nurl = "http://a"\n'


class TestMistakes:
    @pytest.mark.parametrize(
        ("toml", "text"),
        [
            ("[database]\npool_sise = 3", f"database.pool_sise is no setting, did you mean pool_size? {FILE}"),
            ("[database]\nqqqq = 3", f"database.qqqq is no setting {FILE}"),
            ("[databse]\nx = 1", f"databse is no setting, did you mean database? {FILE}"),
            ("[databse]", f"databse is no setting, did you mean database? {FILE}"),
            ("pool_size = 3", f"pool_size is no setting, did you mean database.pool_size? {FILE}"),
            ("[hooks]\nenabeld = []", f"hooks.enabeld is no setting, did you mean enabled? {FILE}"),
            ("[hooks]\nplays = 3", f"hooks.plays is no setting; a hook's settings are a table {FILE}"),
            (
                '[[contracts]]\nadress = "0x"\nabi = "a"',
                f"contracts[0].adress is no setting, did you mean address? {FILE} (and 1 more)",
            ),
            ('[[contracts]]\nabi = "a"', f"contracts[0].address is required {FILE}"),
            ('[[contracts]]\nabi = "a"\naddress = []', f"contracts[0].address must have at least 1 item {FILE}"),
            (
                '[[contracts]]\nabi = 5\naddress = "0x"',
                f"contracts[0].abi must be the name of a file or a list of signatures, got 5 {FILE}",
            ),
            ("[database]\npool_size = 1", f"database.pool_size must be greater than or equal to 2, got 1 {FILE}"),
            ('[http]\nport = "x"', f"http.port must be a valid integer, got 'x' {FILE}"),
            ('[log]\nlevel = "loud"', f"log.level must be 'debug', 'info', 'warning' or 'error', got 'loud' {FILE}"),
            ("[hooks.plays]\non_error = 'stop'", f"hooks.plays.on_error must be 'halt' or 'skip', got 'stop' {FILE}"),
            ("[hooks]\nenabled = [1]", f"hooks.enabled[0] must be a valid string, got 1 {FILE}"),
            ("[hooks]\nenabled = 'x'", f"hooks.enabled must be a list {FILE}"),
            ("database = 'hunter2'", f"database must be a table {FILE}"),
            ("[database]\nurl = 5", f"database.url must be a valid string {FILE}"),
            ("[database]\nurl = 'mysql://h'", f"database.url must begin with postgresql:// or postgres:// {FILE}"),
            ("[http]\nadmin_token = ''", f"http.admin_token must have at least 1 item {FILE}"),
            ("[chain]\nendpoints = ['hunter2']", f"chain.endpoints[0] must be a table {FILE}"),
            (
                "[[chain.endpoints]]\nurl = 'ftp://h'",
                f"chain.endpoints[0].url must begin with http:// or https:// {FILE}",
            ),
            (f"{ENDPOINT}ws = 'http://h'", f"chain.endpoints[0].ws must begin with ws:// or wss:// {FILE}"),
            (
                ENDPOINT + ENDPOINT,
                "chain.endpoints endpoints 0 and 1 (counted from 0) have the same name: give each its own"
                f" (without one it is the host) {FILE}",
            ),
            (f"{ENDPOINT}max_requests_per_second = inf", f"must be a finite number, got inf {FILE}"),
            ("[chain]\nname = 'A'\npoll_seconds = 0\nconfirmations = -1", "(and 2 more)"),
            ('"postgres://u:hunter2@h" = 1', f"(unreadable name) is no setting {FILE}"),
            (
                '[log]\nlevel = "postgres://u:hunter2@h"',
                f"log.level must be 'debug', 'info', 'warning' or 'error' {FILE}",
            ),
        ],
    )
    def test_in_the_file(self, toml: str, text: str) -> None:
        answer = refused(toml)
        assert answer.endswith(text)
        assert "hunter2" not in answer

    @pytest.mark.parametrize(
        ("name", "value", "text"),
        [
            ("DATABSE__URL", "hunter2", "databse is no setting, did you mean INDEXER_DATABASE?"),
            ("HTTP_PORT", "1", "http_port is no setting, did you mean INDEXER_HTTP__PORT?"),
            ("DATABASE__URI", "hunter2", "database.uri is no setting, did you mean url?"),
            ("HOKS__PLAYS__ON_ERROR", "skip", "hoks is no setting, did you mean INDEXER_HOOKS?"),
            ("FOO", "hunter2", "foo is no setting"),
            (
                "CHAIN__ENDPOINTS",
                '[{"url": "hunter2"',
                "chain.endpoints must be JSON, a list [...] or a table {...}, and is not",
            ),
            ("DATABASE", "postgres://u:hunter2@h", "database must be JSON, a list [...] or a table {...}, and is not"),
            ("CHAIN__ENDPOINTS", '{"url": "hunter2"}', "chain.endpoints must be a list"),
            ("HTTP__PORT", "many", "http.port must be a valid integer, got 'many'"),
            ("HTTP__PORT__X", "1", "http.port must be a valid integer"),
            ("DATABASE__URL", "", "database.url must begin with postgresql:// or postgres://"),
        ],
    )
    def test_in_the_environment(self, name: str, value: str, text: str) -> None:
        assert refused(environ={f"INDEXER_{name}": value}) == f"{text} (environment INDEXER_{name})"

    def test_given_twice(self) -> None:
        environ = {"INDEXER_LOG__LEVEL": "info", "INDEXER_log__level": "error"}
        assert refused(environ=environ).startswith("log.level is given twice (environment INDEXER_LOG__LEVEL and")

    def test_on_the_command_line(self) -> None:
        assert refused(overrides={"log.levl": "x"}) == "log.levl is no setting, did you mean level? (command line)"

    def test_variables_that_are_no_settings(self) -> None:
        environ = {
            "INDEXER_CONFIG": "",
            "INDEXER_SECRETS_DIR": "",
            "INDEXER_SERVICE_HOST": "10.0.0.1",
            "INDEXER_SERVICE_PORT_METRICS": "9464",
            "INDEXER_PORT": "tcp://10.0.0.1:9464",
            "INDEXER_PORT_9464_TCP_ADDR": "10.0.0.1",
            "INDEXER_METRICS_PORT": "tcp://10.0.0.1:9464",
            "INDEXER": "x",
            "DATABASE_URL": "postgres://other",
        }
        assert load(environ=environ).settings == Settings()


def sections(model: BaseModel) -> Iterator[BaseModel]:
    yield model
    for _, value in model:
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, BaseModel):
                yield from sections(inner)


class TestModels:
    def test_every_setting_has_a_description(self) -> None:
        assert len(list(known_paths())) > 30
        for path, field in known_paths():
            assert field.description, path

    def test_frozen(self) -> None:
        found = list(sections(load(FULL).settings))
        assert len({type(model) for model in found}) >= 15
        for model in found:
            with pytest.raises(ValidationError, match="frozen"):
                setattr(model, next(iter(type(model).model_fields)), None)
