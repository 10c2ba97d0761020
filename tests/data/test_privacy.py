"""Privacy: what is masked, and above all what is not."""

import time

import pytest

from megachat.config import compose, decode
from megachat.data.privacy import Privacy

MASK = Privacy(email="<E>", identity="<I>", card="<C>", mobile="<M>", phone="<P>", ip="<A>")


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("mail bob.smith+x@mail.co.uk now", "mail <E> now"),
        ("邮箱zhang_san@qq.com，谢谢", "邮箱<E>，谢谢"),
        ("mailto:bob@x.com: hello, or a@b.org/", "mailto:<E>: hello, or <E>/"),
        # 7+9+0+5+0+20+2+9+24+27+7+18+30+5+0+0+4 = 167 = 2 modulo 11, which stands for X.
        ("身份证11010519491231002X。", "身份证<I>。"),
        ("手机13812345678，或 +86 139-1234-5678", "手机<M>，或 <M>"),
        ("(+86)13812345678", "<M>"),
        # Doubled every second digit from the right: 8+2+2+2+2+2+2+2 + 7*1 + 1 = 30.
        ("4111 1111 1111 1111 and 5500-0000-0000-0004", "<C> and <C>"),
        ("378282246310005", "<C>"),
        ("(415) 555-2671 or 415-555-2671, +44 20 7946 0958.", "<P> or <P>, <P>."),
        ("0571-88157777 (010) 62345678 （010）62345678 400-810-8888", "<P> <P> <P> <P>"),
        ("from 93.184.216.34, http://142.250.72.14:80/", "from <A>, http://<A>:80/"),
        ("the host 3.11.7.1 answered", "the host <A> answered"),
        ("2400:cb00:2048:1::c629:d7a2", "<A>"),
        ("2400:cb00:2048:1::c629:d7a2: no route to 2400:cb00::", "<A>: no route to <A>"),
        ("1-415-555-2671, tel=+44 20 7946 0958", "<P>, tel=<P>"),
        ("010-62345678-801 010-62345678/62345679 (010)62345678转801", "<P> <P> <P>"),
        ("138-12345678", "<M>"),
        ("110105 19491231 002X", "<I>"),
        (
            "手机１３８１２３４５６７８，身份证１１０１０５１９４９１２３１００２Ｘ，０１０－６２３４５６７８",
            "手机<M>，身份证<I>，<P>",
        ),
        # UnionPay's, of 17 and 18 digits; the last digit makes the sums 60 and 60.
        ("62220212345678903 622202123456789012", "<C> <C>"),
    ],
)
def test_personal_data_is_masked(text: str, masked: str) -> None:
    assert MASK.apply(text)[0] == masked


@pytest.mark.parametrize(
    "text",
    [
        "@app.route('/users')\n@property\nx = a@b.mean(axis=0) + c @ d",
        "git@github.com:user/repository.git, https://user@host.org/x, root@localhost, user@host",
        "user@example.com, someone@mail.example",  # nobody has these
        "Python 3.11.7.1, v1.2.3.4, section 4.1.2.3, Chrome/90.0.4430.212, x==1.26.4.1, 版本 9.15.222.12",
        "version 9.15.222.12, v. 9.15.222.12, the release 9.15.222.12",
        "2023-11-12 12:30:45, 12/11/2023, 2023.11.12.10, 2023年11月12日",
        "da39a3ee5e6b4b0d3255bfef95601890afd80709, 0x13812345678, 1.2345678901234567, 3.14159265358979",
        "192.168.0.1, 10.0.0.255, 127.0.0.1, 224.0.0.251, 255.255.255.255, 1.3.6.1.4.1.311.21",
        "2001:db8::1, fe80::1, a::b, std::vector, 00:1b:44:11:3a:b7, 10:20:30",
        "4111111111111112, 1111111111111111, ISBN 978-3-16-148410-0",  # wrong check digit; nobody's; a book
        "110105194912310021, 990105194912310028",  # wrong check digit; no such province
        "1600000000000, 15000000000 yuan, 13812345678901, A13812345678, 12812345678",
        "17179869184 bytes, 16777216000",  # 2^34, and 1,000 times 2^24
        "h@self.weight.t(), W@x.grad",
        "42220212345678905",  # only UnionPay's are that long
        "x+1234567890, 100-200-3000, 1-2-3, 1234567890, 0.415-555-2671, 2 400 810",
        "我们在2023年售出了15000000000件，编号为20231112001。",
    ],
)
def test_other_numbers_and_signs_stay(text: str) -> None:
    assert MASK.apply(text) == (text, {})


def test_in_code_more_is_a_number_or_a_product() -> None:
    code = "size = 13812345678\nh = inputs@self.to + weight@layer.grad\nout = h@model.weight.T"
    assert MASK.apply(code, "code") == (code, {})
    comment = "# +86 138 1234 5678, (+86)13812345678, jane.doe@mail.com, x@y.org"
    assert MASK.apply(comment, "code")[0] == "# <M>, <M>, <E>, <E>"


def test_each_kind_is_counted_and_can_be_left_alone() -> None:
    text = "a@b.org c@d.org 13812345678"
    assert MASK.apply(text) == ("<E> <E> <M>", {"mobile": 1, "email": 2})
    emails = Privacy(email="", identity=None, card=None, mobile=None, phone=None, ip=None)
    assert emails.apply(text) == ("  13812345678", {"email": 2})


def test_a_placeholder_is_taken_literally() -> None:
    odd = MASK.model_copy(update={"email": r"\1\g<0>"})
    assert odd.apply("a@b.org")[0] == r"\1\g<0>"


@pytest.mark.parametrize(
    "unit", [" ", "a@a@a@", "1", "1 ", "1.", "a.", "+1", "1-", "(1)", "2222:", "%+-", "0571-"]
)
def test_no_text_takes_more_than_linear_time(unit: str) -> None:
    # A pattern that is quadratic takes minutes for a million characters; linear ones a tenth of a second.
    text = (unit * 1_000_000)[:1_000_000]
    start = time.process_time()
    assert MASK.apply(text) == (text, {})
    assert time.process_time() - start < 5


def test_the_choices_in_conf_mask_all_or_nothing() -> None:
    text = "a@b.org 13812345678 93.184.216.34"
    assert decode(compose("privacy/none")["privacy"]).apply(text) == (text, {})
    masked = "<EMAIL> <PHONE_NUMBER> <IP_ADDRESS>"
    assert decode(compose("privacy/mask")["privacy"]).apply(text) == (
        masked,
        {"email": 1, "mobile": 1, "ip": 1},
    )
