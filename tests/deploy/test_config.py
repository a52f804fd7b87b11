"""ServeConfig: what files mean, and that every mistake names its place, key, value and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorweave.cluster.llm_args import LlmArgs
from tensorweave.cluster.speculation_config import NGramDecodingConfig, UserProvidedDecodingConfig
from tensorweave.cluster.tls import TlsFiles
from tensorweave.deploy.config import ServeConfig, load_config
from tensorweave.deploy.config_file import ConfigError, parse_document, read_document
from tensorweave.deploy.ingress import http_options
from tensorweave.deploy.pools import pool_specs

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "deploy" / "examples").glob("*.yaml"))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "service.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def mistakes(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text), overrides)
    return str(caught.value).replace(f"{tmp_path}/", "").splitlines()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_valid(path: Path) -> None:
    config = load_config(path)
    assert {pool.llm_args().model for pool in config.pools.values()} == {config.model}


def test_pools_take_their_role_from_their_name_and_exchange_kv(tmp_path: Path) -> None:
    text = """
    model: m
    engine: {dtype: float32}
    pools:
      prefill: {replicas: 2, cache_transceiver_config: {kv_transfer_timeout_ms: 5000}}
      decode: {tensor_parallel_size: 2, max_faults: 9}
    """
    config = load_config(write(tmp_path, text))
    prefill, decode = config.pools["prefill"], config.pools["decode"]
    assert (prefill.role, decode.role) == ("prefill", "decode")
    assert (prefill.tensor_parallel_size, decode.tensor_parallel_size) == (1, 2)
    assert prefill.cache_transceiver_config is not None
    assert decode.cache_transceiver_config is not None
    assert prefill.cache_transceiver_config.backend == decode.cache_transceiver_config.backend == "DEFAULT"
    assert prefill.cache_transceiver_config.kv_transfer_timeout_ms == 5000
    specs = {spec.name: spec for spec in pool_specs(config, has_gpus=False)}
    assert specs["decode"].max_faults == 9
    assert specs["decode"].gang.role == "decode"
    assert specs["prefill"].gang.args["cache_transceiver_config"]["backend"] == "DEFAULT"
    assert ServeConfig.from_plain(config.to_plain()) == config


@pytest.mark.parametrize(("text", "expected"), [("", "auto"), ("engine: {generation_config: none}\n", "none")])
def test_a_service_takes_the_models_sampling_fields_unless_told_not_to(
    text: str, expected: str, tmp_path: Path
) -> None:
    """An `LLM` does not unless told to, as TensorRT-LLM's."""
    config = load_config(write(tmp_path, f"model: m\n{text}"))
    [spec] = pool_specs(config, has_gpus=False)
    assert spec.gang.args["generation_config"] == config.shared_args.generation_config == expected
    assert LlmArgs(model="m").generation_config == "none"


@pytest.mark.parametrize("key", ["tool_parser", "reasoning_parser"])
def test_a_parser_has_a_known_name(key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(write(tmp_path, f"model: m\nengine: {{{key}: qwen33}}"))
    where = f"service.yaml:2: engine.{key} = 'qwen33': {key}: unknown format 'qwen33'; did you mean 'qwen3'?"
    assert where in str(refused.value)


@pytest.mark.parametrize(
    ("pools", "roles"),
    [
        ("{embed: {}}", {"embed"}),
        ("{main: {}, embed: {}}", {"both", "embed"}),
        ("{prefill: {}, decode: {}, small: {role: embed}, large: {role: embed}}", {"prefill", "decode", "embed"}),
    ],
)
def test_pools_that_embed_stand_alone_or_beside_others(pools: str, roles: set[str], tmp_path: Path) -> None:
    config = load_config(write(tmp_path, f"model: m\nengine: {{device: cpu}}\npools: {pools}"))
    assert {pool.role for pool in config.pools.values()} == roles
    assert all(pool.cache_transceiver_config is None for pool in config.pools.values() if pool.role == "embed")


def test_embeddings_are_for_cpus(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="embeddings are for CPUs so far"):
        load_config(write(tmp_path, "model: m\nengine: {device: cuda}\npools: {embed: {}}"))


def test_a_role_may_have_another_name_and_an_aggregated_pool_exchanges_nothing(tmp_path: Path) -> None:
    text = "model: m\npools: {big: {role: prefill}, small: {role: prefill}, d: {role: decode}}"
    config = load_config(write(tmp_path, text))
    assert [pool.role for pool in config.pools.values()] == ["prefill", "prefill", "decode"]
    assert load_config(write(tmp_path, "model: m")).pools["main"].cache_transceiver_config is None


def test_a_model_alone_is_a_service(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "model: /models/tiny"))
    assert config.model_name == "tiny"
    assert list(config.pools) == ["main"]
    assert config.shared_args.tensor_parallel_size == 1
    assert (config.router.host, config.router.port) == ("127.0.0.1", 8000)


def test_a_pool_goes_before_the_engine(tmp_path: Path) -> None:
    text = """
    model: m
    engine: {dtype: float32, kv_cache_config: {tokens_per_block: 16, max_tokens: 512}}
    pools: {main: {replicas: 3, kv_cache_config: {max_tokens: 1024}}}
    """
    pool = load_config(write(tmp_path, text)).pools["main"]
    assert (pool.replicas, pool.dtype) == (3, "float32")
    assert (pool.kv_cache_config.tokens_per_block, pool.kv_cache_config.max_tokens) == (16, 1024)
    assert not hasattr(pool.llm_args(), "replicas")


def test_a_services_speculation(tmp_path: Path) -> None:
    """Ranks get what was written, whole; a drafter is a class by its name."""
    text = """
    model: m
    engine: {speculative_config: {decoding_type: NGram, max_draft_len: 4}}
    pools:
      prefill: {}
      decode: {speculative_config: {decoding_type: User_Provided, max_draft_len: 3, drafter: "mine:Drafter"}}
    """
    config = load_config(write(tmp_path, text))
    specs = {
        spec.gang.role: LlmArgs(**spec.gang.args).speculative_config for spec in pool_specs(config, has_gpus=False)
    }
    assert specs["prefill"] == NGramDecodingConfig(max_draft_len=4)
    assert specs["decode"] == UserProvidedDecodingConfig(max_draft_len=3, drafter="mine:Drafter")


def test_a_service_takes_no_drafter_that_is_an_object() -> None:
    class Drafter:
        def prepare_draft_tokens(self, scheduled_requests: object) -> None:
            return None

    config = UserProvidedDecodingConfig(max_draft_len=3, drafter=Drafter())
    with pytest.raises(ValueError, match="drafter as an object is for the LLM class"):
        ServeConfig.model_validate({"model": "m", "pools": {"both": {"speculative_config": config}}})


def test_overrides_have_yaml_types(tmp_path: Path) -> None:
    path = write(tmp_path, "model: m\nrouter: {port: 9000}")
    overrides = [
        "pools.main.replicas=2",
        "engine.enable_chunked_prefill=false",
        "router.port=9001",
        "served_model_name='1'",
    ]
    config = load_config(path, overrides)
    assert config.pools["main"].replicas == 2
    assert config.shared_args.enable_chunked_prefill is False
    assert config.router.port == 9001
    assert config.served_model_name == "1"


def test_an_alias_is_a_copy(tmp_path: Path) -> None:
    text = "model: m\nengine: &all {kv_cache_config: {max_tokens: 64}}\npools: {main: *all}"
    config = load_config(write(tmp_path, text), ["pools.main.kv_cache_config.max_tokens=128"])
    assert config.engine["kv_cache_config"]["max_tokens"] == 64
    assert config.shared_args.kv_cache_config.max_tokens == 128


def test_plain_form_rebuilds_the_same(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "model: m\nengine: {max_batch_size: 3}\npools: {main: {replicas: 2}}"))
    assert ServeConfig.from_plain(config.to_plain()) == config


def test_a_resolved_model_keeps_its_name(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "model: short")).with_model("/cache/long-name")
    assert config.model_name == "short"
    assert config.shared_args.model == "/cache/long-name"


def test_a_model_of_several_names(tmp_path: Path) -> None:
    path = write(tmp_path, "model: m\nserved_model_name: [first, second]")
    config = load_config(path)
    assert (config.model_name, config.model_names) == ("first", ["first", "second"])
    assert config.with_model("/cache/m").model_names == ["first", "second"]
    assert ServeConfig.from_plain(config.to_plain()) == config
    assert load_config(path, ["served_model_name=[a, b]"]).model_names == ["a", "b"]
    assert load_config(path, ["served_model_name=null"]).model_names == ["m"]


@pytest.mark.parametrize(
    ("written", "origins"),
    [
        ("'*'", ["*"]),
        ("https://Chat.Example.org", ["https://chat.example.org"]),
        ("[http://localhost:3000, 'http://[::1]:3000']", ["http://localhost:3000", "http://[::1]:3000"]),
        ("[]", []),
    ],
)
def test_origins_of_web_pages(tmp_path: Path, written: str, origins: list[str]) -> None:
    config = load_config(write(tmp_path, f"model: m\nsecurity: {{cors_origins: {written}}}"))
    assert config.security.cors_origins == origins
    assert load_config(write(tmp_path, "model: m")).security.cors_origins == []
    assert ServeConfig.from_plain(config.to_plain()) == config


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        (
            "model: m\nserved_model_name: {a: 1}",
            [],
            "service.yaml:2: served_model_name = {'a': 1}: must be a name or a list of names",
        ),
        (
            "model: m",
            ["served_model_name=[]"],
            "--set served_model_name=[]: served_model_name = []: a list of names has at least one, and none that is "
            "empty",
        ),
        (
            "model: m\nserved_model_name: [a, b, a]",
            [],
            "service.yaml:2: served_model_name = ['a', 'b', 'a']: 'a' is in the list twice",
        ),
        (
            "model: m\nsecurity: {cors_origins: ['*', 'https://a']}",
            [],
            "service.yaml:2: security.cors_origins: '*' means any origin and must be the only one",
        ),
        (
            "model: m\nsecurity: {cors_origins: 'https://a/'}",
            [],
            "service.yaml:2: security.cors_origins: 'https://a/' is not an origin: scheme://host or scheme://host:port,"
            " without a path",
        ),
        (
            "model: m\npools: {main: {reasoning_parser: qwen3}}",
            [],
            "service.yaml:2: pools.main.reasoning_parser = 'qwen3': 'reasoning_parser' belongs under 'engine'",
        ),
        (
            "model: m\nengin: {}",
            [],
            "service.yaml:2: engin = {}: unknown key 'engin' in ServeConfig; did you mean 'engine'?",
        ),
        ("model: m\nmodel: n", [], "service.yaml:2: model is given twice, first on line 1"),
        ("engine: {}", [], "service.yaml: model is missing"),
        ("model: 5", [], "service.yaml:1: model = 5: Input should be a valid string"),
        ("", [], "service.yaml: model is missing"),
        ("- a", [], "service.yaml:1: a configuration is a mapping of keys to values"),
        ("model: [m", [], "service.yaml:1: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("model: m\n1: 2", [], "service.yaml:2: key '1' is not a word"),
        (
            "model: m\nengine:\n  dtype: float23",
            [],
            "service.yaml:3: engine.dtype = 'float23': Input should be 'auto', 'float16', 'bfloat16' "
            "or 'float32'; did you mean 'float32'?",
        ),
        (
            "model: m\npools:\n  main:\n    replicas: 0",
            [],
            "service.yaml:4: pools.main.replicas = 0: Input should be greater than or equal to 1",
        ),
        (
            "model: m\npools: {main: {role: decode}}",
            [],
            "service.yaml:2: pools.main = {'role': 'decode'}: a pool of role 'decode' needs one of "
            "role 'prefill' (or make it 'both')",
        ),
        (
            "model: m\npools:\n  prefill: {}",
            [],
            "service.yaml:3: pools.prefill = {}: a pool of role 'prefill' needs one of role 'decode' "
            "(or make it 'both')",
        ),
        (
            "model: m\npools: {a: {}, b: {}}",
            [],
            "service.yaml:2: pools.a.role: pool 'a' of role 'both' must be the only pool; for more of it, 'replicas'",
        ),
        (
            "model: m\npools:\n  prefill: {}\n  decode: {}\n  more: {role: both}",
            [],
            "service.yaml:5: pools.more.role = 'both': pool 'more' of role 'both' must be the only "
            "pool; for more of it, 'replicas'",
        ),
        (
            "model: m\npools:\n  prefill: {kv_cache_config: {tokens_per_block: 16}}\n  decode: {}",
            [],
            "service.yaml:4: pools.decode.kv_cache_config.tokens_per_block: pools that exchange KV need the same "
            "kv_cache_config.tokens_per_block; that of pool 'prefill' is 16, here it is 32",
        ),
        (
            "model: m\npools:\n  prefill: {dtype: float32}\n  decode:\n    dtype: bfloat16",
            [],
            "service.yaml:5: pools.decode.dtype = 'bfloat16': pools that exchange KV need the same dtype; "
            "that of pool 'prefill' is 'float32', here it is 'bfloat16'",
        ),
        (
            "model: m\npools:\n  prefill: {}\n  decode:\n    cache_transceiver_config: {backend: null}",
            [],
            "service.yaml:5: pools.decode.cache_transceiver_config.backend = None: a decode pool needs a backend, "
            "'DEFAULT' for one",
        ),
        (
            "model: m",
            ["pools.main.tokenizer=t"],
            "--set pools.main.tokenizer=t: pools.main.tokenizer = 't': 'tokenizer' belongs under 'engine'",
        ),
        (
            "model: m\nengine: {model: n}",
            [],
            "service.yaml:2: engine.model = 'n': 'model' belongs at the top of the file",
        ),
        (
            "model: m",
            ["router.prot=1"],
            "--set router.prot=1: router.prot = 1: unknown key 'prot' in RouterConfig; did you mean 'port'?",
        ),
        (
            "model: m",
            ["router.port"],
            "--set router.port: write it as key.key=value, for example --set router.port=9000",
        ),
        ("model: m", ["model.a=1"], "--set model.a=1: model is 'm', which holds no keys"),
        (
            "model: m\nrouter: {replicas: 2, proxy_port: 8001}",
            [],
            "service.yaml:2: router = {'replicas': 2, 'proxy_port': 8001}: proxy_port 8001 is one of "
            "the replicas' own ports (8000 to 8001)",
        ),
    ],
)
def test_a_mistake_names_place_key_value_and_remedy(
    tmp_path: Path, text: str, overrides: list[str], expected: str
) -> None:
    assert mistakes(tmp_path, text, *overrides) == [expected]


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    lines = mistakes(tmp_path, "model: m\nengine:\n  dtype: x\nlimits:\n  max_queued: -1\n", "router.port=0")
    assert [line.split(" = ")[0] for line in lines] == [
        "service.yaml:3: engine.dtype",
        "--set router.port=0: router.port",
        "service.yaml:5: limits.max_queued",
    ]


@pytest.mark.parametrize(
    ("text", "overrides", "places"),
    [
        (  # in one table, unknown keys and wrong values
            "model: m\nrouter:\n  prot: 1\n  hots: h\n  replicas: 0\n",
            [],
            ["s.yaml:3: router.prot", "s.yaml:4: router.hots", "s.yaml:5: router.replicas"],
        ),
        (  # at the top and inside
            "model: m\nlimit: {}\nrouters: {}\nrouter: {port: x}\n",
            [],
            ["s.yaml:2: limit", "s.yaml:3: routers", "s.yaml:4: router.port"],
        ),
        (  # a key that is refused, one that stands elsewhere, one that is no number, one of a group
            "model: m\nengine:\n  torch_compile_config: {}\n  role: both\n  max_seq_len: true\n"
            "  kv_cache_config:\n    use_uvm: true\n    max_token: 1\npools:\n  main:\n    revision: r\n",
            [],
            [
                "s.yaml:3: engine.torch_compile_config",
                "s.yaml:4: engine.role",
                "s.yaml:5: engine.max_seq_len",
                "s.yaml:7: engine.kv_cache_config.use_uvm",
                "s.yaml:8: engine.kv_cache_config.max_token",
                "s.yaml:11: pools.main.revision",
            ],
        ),
        (  # of the file itself, of --set and of the values
            "model: m\nmodel: n\n1: 2\nrouter: {port: 0}\n",
            ["router.proxy_port", "model.a=1"],
            [
                "s.yaml:2: model is given twice, first on line 1",
                "s.yaml:3: key '1' is not a word",
                "--set router.proxy_port: write it as key.key",
                "--set model.a=1: model is 'n', which holds no keys",
                "s.yaml:4: router.port",
            ],
        ),
        (  # between pools
            "model: m\npools:\n  prefill: {dtype: float32}\n  decode:\n    dtype: bfloat16\n"
            "    cache_transceiver_config: {backend: null}\n",
            [],
            ["s.yaml:5: pools.decode.dtype", "s.yaml:6: pools.decode.cache_transceiver_config.backend"],
        ),
    ],
)
def test_the_second_mistake_is_told_too(tmp_path: Path, text: str, overrides: list[str], places: list[str]) -> None:
    told = [line.replace("service.yaml", "s.yaml") for line in mistakes(tmp_path, text, *overrides)]
    assert [place for place in places if not any(line.startswith(place) for line in told)] == []
    assert len(told) == len(places)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^nowhere\.yaml: cannot be read: No such file or directory$"):
        load_config("nowhere.yaml")


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "service.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_document(path)


@given(st.text(max_size=200) | st.text(alphabet="ab01:-[]{}&*!<>|#'\",. \n", max_size=60))
@settings(max_examples=500, deadline=None)
def test_any_text_is_data_or_a_config_error(text: str) -> None:
    try:
        document = parse_document(text, "any.yaml")
    except ConfigError as error:
        assert str(error).startswith("any.yaml")  # noqa: PT017
    else:
        assert isinstance(document.data, dict)


KEY = "a-key-of-my-own"
DIGEST = "sha256:bfd7f11c5ce0d9a75dc2ab6c1c2e9b66ba13c0e55b6ac1c9d0f2f33c5b0d8ab0"


def test_of_api_keys_only_digests_are_kept(tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text(f"# two\n{KEY}\nanother-key\n", encoding="utf-8")
    text = f"model: m\nsecurity: {{api_keys: [{KEY}, '{DIGEST}'], api_keys_file: {keys}}}"
    config = load_config(write(tmp_path, text))
    assert len(config.security.api_keys) == 3
    assert all(key.startswith("sha256:") and len(key) == 71 for key in config.security.api_keys)
    assert DIGEST in config.security.api_keys
    assert KEY not in f"{config!r} {config.to_plain()}"
    assert ServeConfig.from_plain(config.to_plain()) == config


@pytest.mark.parametrize(
    ("table", "overrides", "told"),
    [
        ("{api_keys: [short]}", (), "8 to 512 visible"),
        ("{api_keys: ['with a space']}", (), "8 to 512 visible"),
        ("{api_keys: [secret-key-1, 5]}", (), "api_keys.1"),
        ("secret-key-1", (), "security"),
        ("{}", ("security.api_keys=secret key",), "api_keys"),
        ("{api_keys_file: no-such-file}", (), "'no-such-file' cannot be read"),
    ],
)
def test_wrong_api_keys_are_not_repeated(tmp_path: Path, table: str, overrides: tuple[str, ...], told: str) -> None:
    [line] = mistakes(tmp_path, f"model: m\nsecurity: {table}", *overrides)
    assert told in line
    assert all(key not in line for key in ("short", "with a space", "secret"))


def test_routers_on_every_host_need_an_address_that_every_host_has(tmp_path: Path) -> None:
    text = "model: m\nrouter: {per_host: true}"
    assert "per_host needs host 0.0.0.0" in mistakes(tmp_path, text)[0]
    assert "leave replicas out" in mistakes(tmp_path, text, "router.host=0.0.0.0", "router.replicas=2")[0]
    config = load_config(write(tmp_path, text), ["router.host=0.0.0.0", "network.transfer=10.80.0.0/16"])
    assert config.router.per_host
    assert {spec.gang.transfer_network for spec in pool_specs(config, has_gpus=False)} == {"10.80.0.0/16"}


def test_encryption_is_by_option(tmp_path: Path) -> None:
    text = "model: m"
    plain = load_config(write(tmp_path, text))
    assert {spec.gang.tls for spec in pool_specs(plain, has_gpus=False)} == {None}
    assert plain.endpoint == "http://127.0.0.1:8000"
    peers = "{certificate: h.pem, key: h.key, authority: ca.pem}"
    changes = [f"network.tls={peers}", "router.tls={certificate: a, key: b}"]
    config = load_config(write(tmp_path, text), changes)
    assert {spec.gang.tls for spec in pool_specs(config, has_gpus=False)} == {TlsFiles("h.pem", "h.key", "ca.pem")}
    assert ServeConfig.from_plain(config.to_plain()) == config
    assert config.endpoint == "https://127.0.0.1:8000"
    assert http_options(config.router)["ssl_keyfile"] == "b"
    [missing] = mistakes(tmp_path, text, "network.tls={certificate: h.pem, key: h.key}")
    assert "network.tls" in missing
    assert "authority" in missing
