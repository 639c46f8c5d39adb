"""Which servers the handler connects to: every spelling of every address that is not public."""
# ruff: noqa: E501, RUF001

import ipaddress
import random
import socket
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import addresses
from addresses import is_private, is_public, parse, resolve
from errors import RequestError
from fetch import fetch

PRIVATE = [
    *("0.0.0.0", "0.1.2.3", "10.0.0.1", "10.255.255.255", "100.64.0.1", "100.100.100.200"),
    *("127.0.0.1", "127.0.1.1", "127.255.255.254", "169.254.169.254", "169.254.170.2"),
    *("169.254.170.23", "169.254.0.1", "172.16.0.1", "172.31.255.255", "192.0.0.1", "192.0.0.192"),
    *("192.0.2.1", "192.88.99.1", "192.168.0.1", "192.168.255.255", "198.18.0.1", "198.19.255.255"),
    *("198.51.100.7", "203.0.113.7", "224.0.0.1", "239.255.255.250", "240.0.0.1", "168.63.129.16"),
    *("255.255.255.255",),
]
PRIVATE_6 = [
    *("::", "::1", "::2", "fe80::1", "fe80::1%eth0", "fe80::1%25eth0", "febf::1", "fc00::1"),
    *("fd00::1", "fd00:ec2::254", "fd20:ce::254", "fec0::1", "ff02::1", "ff0e::1", "100::1"),
    *("2001:db8::1", "2001::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:10::1", "3fff::1"),
    *("5f00::1", "4000::1", "::ffff:0:7f00:1", "::127.0.0.1", "64:ff9b:1::7f00:1"),
]


def spellings(ip: str) -> list[str]:
    """An IPv4 address as different parsers understand it, and inside IPv6 addresses."""
    a, b, c, d = (int(part) for part in ip.split("."))
    number = int(ipaddress.ip_address(ip))
    high, low = number >> 16, number & 0xFFFF
    wide = str.maketrans("0123456789.", "０１２３４５６７８９．")
    return [
        ip,
        f"{ip}.",
        str(number),
        hex(number),
        hex(number).upper(),
        f"0{number:o}",
        f"{a}.{number & 0xFFFFFF}",
        f"{a}.{b}.{c << 8 | d}",
        f"{a:#x}.{b:#x}.{c:#x}.{d:#x}",
        f"0{a:o}.0{b:o}.0{c:o}.0{d:o}",
        f"00{a:o}.{b}.{c:#x}.{d}",
        f"0{a:o}.{number & 0xFFFFFF}",
        ip.translate(wide),
        ip.replace(".", "。"),
        f"[::ffff:{ip}]",
        f"[::ffff:{high:x}:{low:x}]",
        f"[0:0:0:0:0:ffff:{ip}]",
        f"[::{ip}]",
        f"[64:ff9b::{ip}]",
        f"[64:ff9b::{high:x}:{low:x}]",
        f"[64:ff9b:1::{ip}]",
        f"[2002:{high:x}:{low:x}::]",
        f"[2002:{high:x}:{low:x}::1]",
    ]


MALFORMED = [
    *("", "http", "http:", "http:/", "http://", "https://", "http:///", "http:///etc/passwd", "//a.com/"),
    *("dog.jpg", "/etc/passwd", "a.com/dog.jpg", "javascript:alert(1)", "about:blank", "data:,a"),
    *("file:///etc/passwd", "ftp://a.com/", "gopher://127.0.0.1:6379/_", "dict://a.com:11211/", "ldap://a"),
    *("jar:http://a.com!/", "netdoc:///etc/passwd", "unix:///var/run/docker.sock", "http+unix://a/b"),
    *("http://[", "http://[::1", "http://]", "http://[]/", "http://[::1]:a/", "http://[1.2.3.4]/"),
    *("http://[::g]/", "http://[v1.a]/", "http://a..b/", "http://.a.com/", "http://./"),
    *("http://a.com:99999/", "http://a.com:-1/", "http://a.com:8O/", "http://a.com:٨٠/", "http://:80/"),
    *("http://a b.com/", "http://a.com\\@127.0.0.1/", "http:\\\\127.0.0.1\\", "http://127.0.0.1\\.a.com/"),
    *("http://127.0.0.1\t/", "http://127.0.0.1\n/", "http://a.com/\r\nHost: b.com", "http://a.com\0.b.com/"),
    *(" http://127.0.0.1/", "http://127.0.0.1/ ", "\x01http://127.0.0.1/", "ht\ntp://127.0.0.1/"),
    *("http://256.1.1.1/", "http://1.2.3.4.5/", "http://1.2.3.08/", "http://a.1/", "http://a.0x7f/", "http://4294967296/"),
    *("http://[2606:4700::1% a]/", "http://[fe80::1%☃]/", "http://[::1%a/b]/"),
    *("http://127%2e0%2e0%2e1/", "http://%31%32%37.0.0.1/", "http://a%00.com/"),
    *("http://a,b.com/", "http://a;b.com/", "http://a!b.com/", "http://$(id).com/", "http://`id`.com/"),
    *("http://{a}.com/", "http://a|b.com/", "http://<a>.com/", "http://a\u202e.com/", "http://a\u2100.com/"),
    *("http://-a.com/", "http://" + "a" * 64 + ".com/", "http://" + "a." * 130 + "com/", "http://\ud800.com/"),
    *("http://xn--a.xn--\u00fc/", "http://a.com/" + "a" * 9000, "HTTP", "http//a.com", "://a.com", "http:a.com"),
    *("s3:", "s3://", "s3://bucket", "s3://bucket/", "s3:///key", "S3://bucket/key", "s3://b/k", "s3://[/a"),
]  # fmt: skip
FORBIDDEN = [
    *("http://localhost/", "http://LOCALHOST/", "http://localhost./", "http://a.localhost/"),
    *("http://localhost.localdomain/", "http://metadata/", "http://metadata.google.internal/"),
    *("http://metadata.google.internal./computeMetadata/v1/", "http://instance-data/latest/"),
    *("http://ip-10-0-0-1.ec2.internal/", "http://router.lan/", "http://nas.local/", "http://a.corp/"),
    *("http://intranet/", "http://db.intranet/", "http://a.home.arpa/", "http://a.private/"),
    *("http://ＬＯＣＡＬＨＯＳＴ/", "http://ⓛⓞⓒⓐⓛⓗⓞⓢⓣ/", "https://kubernetes/", "http://docker/"),
    *("http://user@a.com/", "http://user:word@a.com/", "http://a.com@127.0.0.1/", "http://@a.com/"),
    *("http://a.com:80@127.0.0.1/", "http://127.0.0.1:80@a.com/", "http://a.com%40b@127.0.0.1/", "http://a.com%2f@b/"),
    *("http://a.com:22/", "http://a.com:6379/", "http://a.com:8080/", "http://a.com:0/", "https://a.com:1/"),
    *("http://127.0.0.1:9001/2018-06-01/runtime/invocation/next", "http://[::1]:9001/"),
    *("http://127.1/", "http://0/", "http://0x7f.1/", "http://017700000001/", "http://①②⑦.⓪.⓪.①/"),
    *("s3://bucket/key", "s3://other-bucket/../key", "s3://bucket/" + "k" * 1000),
]  # fmt: skip


@pytest.fixture
def connections(monkeypatch):
    """What was connected to, while nothing is; and a name service that only knows numbers."""
    made = []
    real = socket.getaddrinfo

    def connect(self, place):
        made.append(place)
        raise ConnectionRefusedError

    def lookup(host, port, **arguments):
        return real(host, port, flags=socket.AI_NUMERICHOST, **arguments)

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.delenv("ALLOW_PRIVATE_HOSTS", raising=False)
    monkeypatch.delenv("ALLOWED_HOSTS", raising=False)
    monkeypatch.delenv("IMAGE_BUCKET", raising=False)
    return made


def refusal(url: str) -> RequestError:
    with pytest.raises(RequestError) as caught:
        fetch(url, time.monotonic() + 5)
    return caught.value


@pytest.mark.parametrize("ip", PRIVATE)
def test_no_private_address_is_reached_in_any_spelling(connections, ip):
    for host in spellings(ip):
        for form in (
            "http://{}/",
            "https://{}/latest/meta-data/",
            "HTTP://{}:80/",
            "http://{}:443",
        ):
            error = refusal(form.format(host))
            assert error.status in (400, 403), (form, host, error.status)
    assert connections == []


@pytest.mark.parametrize("ip", PRIVATE_6)
def test_no_private_ipv6_address_is_reached(connections, ip):
    assert refusal(f"http://[{ip}]/").status in (400, 403)
    assert refusal(f"https://[{ip.upper()}]:443/").status in (400, 403)
    assert connections == []


@pytest.mark.parametrize("url", MALFORMED)
def test_what_is_no_address_is_a_400(connections, url):
    assert refusal(url).status == 400
    assert connections == []


@pytest.mark.parametrize("url", FORBIDDEN)
def test_what_is_not_allowed_is_a_403(connections, url):
    assert refusal(url).status == 403
    assert connections == []


@pytest.mark.parametrize("ip", ["8.8.8.8", "93.184.216.34", "1.1.1.1", "2606:4700:4700::1111"])
def test_public_addresses_are_reached(connections, ip):
    host = f"[{ip}]" if ":" in ip else ip
    assert refusal(f"http://{host}/a.jpg").status == 502  # nobody answers in this test
    assert [place[:2] for place in connections] == [(ip, 80)]


def test_ip_addresses_against_the_standard_library():
    """What `ipaddress` calls not global is not public here; the rest are the table's own rows."""
    rng = random.Random(0)
    for _ in range(20_000):
        ip = ipaddress.IPv4Address(rng.getrandbits(32))
        if is_public(ip):
            assert ip.is_global and not ip.is_multicast, ip
        ip = ipaddress.IPv6Address(rng.getrandbits(125) | 1 << 125)  # in 2000::/3
        if is_public(ip):
            assert ip.is_global and ip.sixtofour is None and ip.teredo is None, ip


@given(st.ip_addresses(v=6))
def test_no_ipv6_address_outside_the_unicast_space_is_public(ip):
    assert not is_public(ip) or (int(ip) >> 125 == 1 and ip.ipv4_mapped is None)


@given(st.text(max_size=60).map(lambda text: f"http://{text}/"))
@example("http://[::ffff:127.0.0.1]/")
@example("http://ⅷ.com/")
def test_any_text_is_an_address_or_a_4xx(text):
    try:
        address = parse(text)
    except RequestError as error:
        assert error.status in (400, 403)
    else:
        assert address.host.isascii() and address.host == address.host.lower()
        assert not set(address.host) & set("/\\@#? \t\r\n")
        assert address.target.isascii() and address.target.startswith("/")
        assert not set(address.target) & set(" \t\r\n")


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("http://a.com", "/"),
        ("http://a.com?b=c", "/?b=c"),
        ("http://a.com/a%20b/ä ö?x=%2F&y=ü#fragment", "/a%20b/%C3%A4%20%C3%B6?x=%2F&y=%C3%BC"),
        ("https://b.s3.amazonaws.com/k?X-Amz-Signature=a+b%2Bc==", "/k?X-Amz-Signature=a+b%2Bc=="),
    ],
)
def test_path_and_query_are_sent_as_they_came(url, target):
    assert parse(url).target == target


def test_a_name_in_another_script_is_looked_up_as_ascii():
    assert parse("http://Bücher.example/").host == "xn--bcher-kva.example"


class Names:
    """A name service whose answers change: each name has a list of them, used in turn."""

    def __init__(self, answers: dict[str, list[list[str]]]):
        self.answers = answers
        self.asked = []

    def __call__(self, host, port, **_):
        self.asked.append(host)
        found = self.answers[host].pop(0)
        return [
            (
                socket.AF_INET6 if ":" in ip else socket.AF_INET,
                socket.SOCK_STREAM,
                6,
                "",
                (ip, port, 0, 0) if ":" in ip else (ip, port),
            )
            for ip in found
        ]


def test_a_name_that_changes_its_answer_is_asked_once(connections, monkeypatch):
    names = Names({"rebind.example": [["93.184.216.34"], ["127.0.0.1"], ["169.254.169.254"]]})
    monkeypatch.setattr(socket, "getaddrinfo", names)
    assert refusal("http://rebind.example/").status == 502
    assert connections == [("93.184.216.34", 80)]
    assert names.asked == ["rebind.example"]


@pytest.mark.parametrize(
    "answer",
    [
        ["127.0.0.1"],
        ["93.184.216.34", "127.0.0.1"],
        ["169.254.169.254", "93.184.216.34"],
        ["93.184.216.34", "fd00:ec2::254"],
        ["::ffff:10.0.0.1"],
        ["64:ff9b::a00:1"],
    ],
)
def test_a_name_with_one_private_address_is_refused(connections, monkeypatch, answer):
    monkeypatch.setattr(socket, "getaddrinfo", Names({"mixed.example": [answer]}))
    assert refusal("http://mixed.example/").status == 403
    assert connections == []


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (socket.gaierror(socket.EAI_NONAME, "unknown"), 400, "host_not_found"),
        (socket.gaierror(socket.EAI_AGAIN, "later"), 502, "fetch_failed"),
        (socket.gaierror(socket.EAI_FAIL, "failure"), 502, "fetch_failed"),
    ],
)
def test_names_that_cannot_be_resolved(monkeypatch, error, status, code):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    failure = refusal("http://unknown.example/")
    assert (failure.status, failure.code) == (status, code)


def test_a_name_service_that_hangs_is_a_504_in_time(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(3))
    started = time.monotonic()
    with pytest.raises(RequestError) as caught:
        fetch("http://slow.example/", time.monotonic() + 0.2)
    assert caught.value.status == 504
    assert time.monotonic() - started < 1


def test_only_listed_hosts(connections, monkeypatch):
    monkeypatch.setenv("ALLOWED_HOSTS", "img.example.com, *.example.org")
    names = Names({name: [["93.184.216.34"]] for name in ("img.example.com", "a.b.example.org")})
    monkeypatch.setattr(socket, "getaddrinfo", names)
    for url in ("http://img.example.com/", "https://IMG.example.com./", "http://a.b.example.org/"):
        parse(url)
    for host in ("example.com", "a.img.example.com", "example.org", "evilexample.org", "8.8.8.8"):
        assert refusal(f"http://{host}/").status == 403
    assert connections == []


def test_without_an_exception_nothing_private_is_allowed(connections):
    assert addresses._listed("ALLOW_PRIVATE_HOSTS") == []
    assert refusal("http://127.0.0.1:4566/bucket/key").status == 403


def test_an_exception_is_for_one_host_and_one_port(connections, monkeypatch):
    monkeypatch.setenv("ALLOW_PRIVATE_HOSTS", "127.0.0.1:4566")
    assert refusal("http://127.0.0.1:4566/bucket/key").status == 502
    assert connections == [("127.0.0.1", 4566)]
    for url in (
        "http://127.0.0.1/",
        "http://127.0.0.1:4567/",
        "http://127.0.0.2:4566/",
        "http://localhost:4566/",
        "http://2130706433:4566/",
        "http://[::1]:4566/",
    ):
        assert refusal(url).status == 403
    assert len(connections) == 1


@pytest.mark.parametrize(
    "place",
    ["169.254.169.254:80", "[fd00:ec2::254]:80", "168.63.129.16:80", "100.100.100.200:80"],
)
def test_no_exception_opens_a_metadata_endpoint(connections, monkeypatch, place):
    monkeypatch.setenv("ALLOW_PRIVATE_HOSTS", place)
    assert refusal(f"http://{place}/").status == 403
    assert not is_private(ipaddress.ip_address(place.rpartition(":")[0].strip("[]")))
    assert connections == []


def test_proxies_of_the_environment_are_not_used(connections, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:3128")
    refusal("http://93.184.216.34/")
    assert connections == [("93.184.216.34", 80)]


def test_resolve_gives_what_is_connected_to():
    places = resolve(parse("http://8.8.8.8/"), time.monotonic() + 5)
    assert places == [(socket.AF_INET, ("8.8.8.8", 80))]
