"""No text can become markup."""

from megachat.evals.markup import Html, document, element, table


def test_text_is_escaped_and_elements_are_not():
    cell = element("td", "a < b & c", element("b", "d"), class_="n")
    assert cell == '<td class="n">a &lt; b &amp; c<b>d</b></td>'


def test_a_script_in_a_text_or_an_attribute_stays_text():
    evil = '"><script>alert(1)</script>'
    made = document(evil, element("p", evil, title=evil), table([evil], [[evil]]))
    assert "<script" not in made
    assert made.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 5


def test_what_is_none_is_left_out():
    assert element("p", None, "x", class_=None) == "<p>x</p>"


def test_numbers_become_text():
    assert table(["n"], [[3]], numeric=(0,)).count('class="n"') == 2
    assert element("td", 3) == "<td>3</td>"


def test_an_element_without_contents_is_not_closed():
    assert element("meta", charset="utf-8") == '<meta charset="utf-8">'


def test_joining_an_html_to_a_string_makes_it_text_again():
    assert not isinstance(Html("<b>") + "x", Html)
