"""What a search found, in words and as a picture."""

from xml.etree import ElementTree

import pytest

from whet.report import finding


def test_words_say_what_each_place_got_and_why_not(said):
    words = dict(finding.explained(said))
    assert words["What was asked for"] == [
        "drop at most 1pp; as little latency as possible.", "2 trials in 2 min.",
    ]  # fmt: skip
    alone = "alone it is expected to change the outputs by 0.02 and saves"
    assert words["What each place got"] == [
        f"a: L1Filters, amount 0.5; {alone} 25.0 % of the MACs.",
        f"b: no L1Filters; amount 0.5, {alone} 5.0 % of the MACs.",
    ]
    assert "drop +0.20pp, latency 0.500x, size 0.500x; taken." in words["What was tried"][0]
    assert words["Predicted and measured"] == ["latency: rank correlation 0.90 over the trials."]
    assert words["Techniques that were turned down"] == ["<b>: no place & no hope.", "Svd: slow."]
    assert "Notes" not in words


@pytest.mark.parametrize(
    ("unit", "error", "drop"),
    [
        ("%", 0.00123, "+0.20 ± 0.12pp,"),
        ("", 0.00123, "+0.002 ± 0.0012,"),
        ("%", None, "+0.20pp,"),
    ],
)
def test_a_drop_is_told_with_its_standard_error(said, unit, error, drop):
    said["trials"][0] |= {"unit": unit, "drop_error": error}
    assert f"drop {drop}" in dict(finding.explained(said))["What was tried"][0]
    assert (
        "±" not in finding.section(said)[finding.section(said).index("<text") :].split("</text>")[0]
    )


def test_techniques_with_one_reason_share_a_line(said):
    said["techniques"] |= {"Cp": "slow"}
    assert "Svd, Cp: slow." in dict(finding.explained(said))["Techniques that were turned down"]


def test_the_picture_has_a_dot_a_trial_with_its_recipe(said):
    page = finding.section(said)
    svg = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    dots = svg.findall("circle")
    assert sorted(dot.get("class") for dot in dots) == ["final", "taken"]
    places = {dot.get("class"): (float(dot.get("cx")), float(dot.get("cy"))) for dot in dots}
    assert places["taken"][0] > places["final"][0]  # slower is to the right
    assert places["taken"][1] > places["final"][1]  # a larger drop is higher
    assert all("L1Filters" in dot.findtext("title") for dot in dots)
    assert "<b>" not in page
    assert "&lt;b&gt;" in page


def test_one_trial_alone_is_drawn(said):
    said["trials"] = said["trials"][:1]
    assert finding.section(said).count("<circle") == 1


@pytest.mark.parametrize("report", [{}, {"search": None}, {"search": "no"}])
def test_a_report_without_a_search_has_no_section(report):
    assert finding.search_of(report) is None


def test_the_heat_map_has_a_cell_for_each_offer_and_marks_what_was_taken(said):
    said["options"][1] |= {"value": 0.75, "deviation": 1e-9}
    said["options"][0] |= {"deviation": 2.0}
    page = finding.section(said)
    table = ElementTree.fromstring(page[page.index("<table") : page.index("</table>") + 8])
    head, first, second = table.findall("tr")
    assert [cell.text for cell in head] == ["place", "amount 0.5", "amount 0.75"]
    place, taken, nothing = first
    assert (place.text, taken.get("class"), nothing.text) == ("a", "cell got", "–")
    assert taken.get("style") == "--heat:1.000"
    assert "25.0 % of the MACs" in taken.get("title")
    assert second[2].get("style") == "--heat:0.000"
    assert second[2].get("class") == "cell"


def test_predicted_stands_beside_measured(said):
    assert "→" not in finding.section(said)
    said["trials"][1]["predicted"] = {"latency": 0.25, "size": 0.6}
    page = finding.section(said)
    table = page[page.index("Predicted → measured") :]
    table = ElementTree.fromstring(table[table.index("<table") : table.index("</table>") + 8])
    assert [[cell.text for cell in row] for row in table] == [
        ["trial", "outputs moved", "drop", "latency", "size"],
        ["2", "0.1", "+3.00pp", "0.250 → 0.300", "0.600 → 0.500"],
    ]
