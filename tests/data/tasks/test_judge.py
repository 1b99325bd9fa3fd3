r"""Answers judged as people judge them: a table of responses, references and verdicts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.tasks.judge import extract, is_right, stated
from data.tasks.normal import is_same

RIGHT = [
    ("The answer is 18 (9 eggs × $2).", "18"),
    ("The answer is 160 minutes (2 hours and 40 minutes).", "160"),
    ("答案是8。", "8"),
    (r"\boxed{12\text{ cm}^2}", "12"),
    (r"\boxed{12\,\text{cm}^2}", "12 cm^2"),
    (r"\boxed{12\text{ in}^2}", "12"),
    (r"\boxed{5 = x}", "5"),
    ("5 inch", "5 inches"),
    ("The answer is 5 months.", "5"),
    ("5 lakh", "500,000"),
    ("6 ft", "6 feet"),
    ("2 hrs", "2 hours"),
    ("5 box", "5 boxes"),
    ("3 glasses", "3 glass"),
    ("12 square feet", "12 ft^2"),
    ("60 km per hour", "60 km/h"),
    ("He runs 3*180=540, so ... 540 meters a week", "540"),
    ("The answer is $64 for 16 glasses.", "64"),
    (r"\boxed{12\text{ cm}^{2}}", "12 square cm"),
    (r"\boxed{1/6}", r"0.1\overline{6}"),
    (r"0.\overline{3}", "1/3"),
    # where the answer is
    (r"\boxed{18}", "18"),
    (r"so $\boxed{\frac{1}{2}}$.", "1/2"),
    (r"\boxed{5}. Wait: \boxed{6}", "6"),
    (r"put it into \boxed{}: \boxed{6}, not \boxed{}", "6"),
    (r"$\boxed 5.5$.", "5.5"),
    (r"\fbox{5}", "5"),
    ("The answer is 18.", "18"),
    ("The answer is 18.\nShe had 16 eggs.", "18"),
    ("The answer is not 5 but 6.", "6"),
    ("The answer is 18 dollars, since 9*2 = 18.", "18"),
    ("The answer is 18 because 9*2 is 18", "18"),
    ("The answer is 6, not 5.", "6"),
    ("The answer is that Janet makes $18 every day.", "18"),
    ("The answer is:\n\\[ 18 \\]", "18"),
    ("**Answer:** 18", "18"),
    ("**Answer**: 18 eggs", "18"),
    ("### Final Answer:\n\n18", "18"),
    ("9 * 2 = 18\n#### 18", "18"),
    ("#### Step 2: add 5\nSo it is 18", "18"),
    ("She sells 9 eggs at 2 each, 18 in total", "18"),
    ("16 - 3 - 4 = 9, 9 * 2 = 18", "18"),
    ("She makes 18 dollars a day.", "18"),
    ("<think>20</think>\n18", "18"),
    ("20</think>18", "18"),
    # numbers
    ("−3", "-3"),
    ("x = - 5", "-5"),
    ("The answer is minus 3", "-3"),
    ("0.5", "1/2"),
    (r"\frac{1}{2}", "0.5"),
    (r"\dfrac12", "1/2"),
    (r"so $x = \frac{ 1 }{ 2 }$.", "0.5"),
    ("3 / 4", "0.75"),
    ("2 1/2", "2.5"),
    ("2½", "2.5"),
    ("two days and a half, so 2 and a half", "2.5"),
    (r"2\frac{1}{2}", "5/2"),
    ("1,200", "1200"),
    ("1 200", "1200"),
    (r"1{,}200", "1200"),
    (r"\boxed{11,\! 111,\! 111,\! 100}", "11111111100"),
    ("11111111100", r"11,\! 111,\!111,\! 100"),
    (r"The answer is $1,\! 200$.", "1200"),
    ("$1200.00", "1,200"),
    ("5 million", "5000000"),
    ("2e3", "2000"),
    (r"\boxed{x=\frac12}", "0.5"),
    ("5", "x = 5"),
    ("9*2=18", "18"),
    ("Total: $2 × 9 = $18", "18"),
    # emphasis and formulas
    ("**18**", "18"),
    ("*18*", "18"),
    ("**The answer is 18** dollars.", "18"),
    ("`18`", "18"),
    ("$18$", "18"),
    (r"\(18\)", "18"),
    (r"\boxed{\$18}", "18"),
    # units and words
    ("18 dollars", "18"),
    ("$18.00", "18"),
    ("72 apples", "72"),
    ("18%", "18"),
    ("50%", "0.5"),
    ("0.5", r"50\%"),
    ("50 percent", "50%"),
    ("10", "10 cm"),
    ("10 cm", r"10\text{ cm}"),
    ("90°", r"90^\circ"),
    (r"\boxed{18 \text{ dollars}}", "18"),
    ("The price is $18/day", "18"),
    ("Janet's dog runs 18 km/h.", "18"),
    # choices
    ("(B)", "B"),
    ("B.", "B"),
    ("B)", "B"),
    ("$B$", "B"),
    ("B", "(B)"),
    ("**B**", "B"),
    (r"\boxed{\text{(B)}}", "B"),
    ("Option B", "B"),
    ("The answer is (b)", "B"),
    ("The answer is B.", "B"),
    ("I choose B", "B"),
    ("(B) 12 apples", "B"),
    ("The answer is (B) 12 apples", "12"),
    # lists, sets, intervals, formulas, text
    ("3, 5", "3,5"),
    ("-2, 1", "1,-2"),
    ("x=5 or x=3", "3, 5"),
    ("(3, 5)", "(3,5)"),
    (r"\boxed{(0.5, 3)}", r"\left(\frac{1}{2},3\right)"),
    (r"\{1,2\}", r"\{2, 1\}"),
    ("[2, 3)", "[2,3)"),
    (r"\boxed{x \in [2, 3)}", "[2,3)"),
    ("The answer is $x=3$ or $x=-3$.", "3, -3"),
    ("x^2 + 1", "x^2+1"),
    (r"\boxed{x^{2}}", "x^2"),
    ("52_{8}", "52_8"),
    ("Paris", "Paris"),
    ("**Paris**", "Paris"),
    ("The answer is Paris.", "Paris"),
    (r"\boxed{\text{Paris}}", "Paris"),
    ("Route 66", "Route 66"),
    ("5:30", "5:30"),
    ("a\nb", "a\nb"),
]
WRONG = [
    ("The answer is 18 square feet", "18 square inches"),
    ("The answer is 5 cubic meters", "5 cubic feet"),
    ("12 cm^2", "12 cm^3"),
    ("The answer is 60 km/h", "60 km/s"),
    (r"\boxed{60 \text{ km/s}}", "60 km/h"),
    ("The answer is 5 tenths.", "5"),
    ("The answer is 5 hundredths.", "5"),
    ("5 lakh", "5"),
    ("5 mln", "5"),
    ("never 5", "5"),
    (r"\boxed{\alpha^2 = 5}", "5"),
    ("The answer is 5 (or 6).", "5"),
    ("The answer is 5 (2).", "5"),
    ("The answer is 5 (million).", "5"),
    ("The answer is 5 for 2 and 6 for 3 people.", "5"),
    ("The answer cannot be 5.", "5"),
    ("It can't be 5", "5"),
    ("The answer is 60 km.", "60 km/h"),
    ("The answer is 60 km/h.", "60 km"),
    ("0.16", r"0.1\overline{6}"),
    # where no answer is
    ("", "72"),
    ("I do not know", "18"),
    ("<think>\nso 18", "18"),
    ("<think>18</think>\n20", "18"),
    (r"\boxed{18", "18"),
    (r"\boxed{5} or rather \boxed{18", "5"),
    (r"\boxed{5}. Wait: \boxed{6}", "5"),
    (r"There are 6 cases: \boxed{B}", "6"),
    ("The answer is ...", "18"),
    # hedges
    ("The answer is not 5 but 6.", "5"),
    ("The answer is 5 or 6.", "5"),
    ("The answer is 5 or 6.", "6"),
    ("It is 5 or 6", "6"),
    ("1, 2, 3, 4, 5", "5"),
    ("1 2 3 4 5", "5"),
    ("The answer is 5-6", "5"),
    ("The answer is more than 18", "18"),
    ("less than 18", "18"),
    ("(A) or (B)", "B"),
    (r"\boxed{5, 6}", "5"),
    # other numbers
    ("1201", "1200"),
    ("-3", "3"),
    ("It is negative 3", "3"),
    ("x = - 5", "5"),
    ("18 - 5", "5"),
    ("3,5", "35"),
    (r"12,\! 34", "1234"),
    ("12,3", "1,23"),
    ("0,500", "500"),
    ("9007199254740992", "9007199254740993"),
    ("0.333333", "1/3"),
    ("3 / 4", "4"),
    ("2 1/2", "1/2"),
    ("5²", "52"),
    ("2**3**4", "234"),
    ("1/0", "0"),
    ("1e999999999", "1"),
    ("٣", "3"),
    ("It is 5:30", "30"),
    ("5 million", "5"),
    ("5 and a half", "5"),
    ("twice 5", "5"),
    (r"\boxed{5!}", "5"),
    # formulas with the number
    ("5x", "5"),
    (r"5\pi", "5"),
    (r"\sqrt{5}", "5"),
    (r"\boxed{5^2}", "5"),
    (r"3^\frac{1}{2}", "3/2"),
    ("x + 2 = 4", "4"),
    ("So 3x=20", "20"),
    ("y = 5", "x = 5"),
    ("Total >= 5", "5"),
    (r"\boxed{x \ne 5}", "5"),
    ("2*-3", "2-3"),
    ("x^{2}3", "x^23"),
    ("52_8", "52"),
    ("52_9", "52_8"),
    # other units, brackets, texts
    ("10 m", "10 cm"),
    ("(3, 5)", "[3,5]"),
    ("(3, 5)", "(5,3)"),
    ("(3,5)", "35"),
    (r"\{1,2\}", "(1,2)"),
    (r"\{1,1,2\}", r"\{1,2,2\}"),
    ("1,1,2", "1,2,2"),
    ("[2, 3]", "[2,3)"),
    ("The answer is A.", "B"),
    ("paris", "Paris"),
    ("66", "Route 66"),
    ("New York", "NewYork"),
]


@pytest.mark.parametrize(
    ("response", "reference", "right"), [(*pair, True) for pair in RIGHT] + [(*pair, False) for pair in WRONG]
)
def test_verdicts(response, reference, right):
    assert is_right(response, reference) is right


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("I do not know.", None),
        (r"about \boxed{18", None),
        ("<think>18", None),
        (r"The answer is 5, not \boxed{}.", "5"),
        ("The answer is", None),
        ("3 cats and 5 dogs", "5"),
        ("It is 3 and 5.", "3 and 5"),
        ("There are 5 million of them.", "5 million"),
        ("We get 2x + 4 = 10.", "2x + 4 = 10"),
        (r"\boxed{\left\{ \frac{1}{2} \right\}} is it", r"\left\{ \frac{1}{2} \right\}"),
    ],
)
def test_the_final_answer_of_a_response(response, answer):
    assert extract(response) == answer


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("<think>\n5\n</think>\nWe add 3 to 5.\nSo it is $\\boxed{8}$, as 3 is given.", "8"),
        ("9 * 2 = 18\n#### 18", "18"),
        ("18 square feet", "18 square feet"),
        ("x^2 + 1", "x^2 + 1"),
        ("(B)", "(B)"),
        ("Born in 1912.", None),
        ("It is even.\nSo n = 2", None),
    ],
)
def test_a_reference_states_an_answer_or_is_free_text(reference, answer):
    assert stated(reference) == answer


PARTS = [*"0123456789 ,./%$+-=*^_(){}[]\\\n\tABxy'½", "\\frac", "\\boxed{", "answer is ", "####", "and", "cm"]
TEXTS = st.lists(st.sampled_from(PARTS)).map("".join)


@given(TEXTS, TEXTS)
def test_no_text_breaks_the_judge(response, reference):
    answer = extract(response)
    assert answer is None or answer.strip()
    assert is_right(response, reference) in (True, False)
    assert stated(reference) is None or stated(reference).strip()


SPELLINGS = ("{:,}", "**{}**", "${}.00$", r"\boxed{{{}}}", "The answer is {}.", "x = {} dollars", r"\frac{{{}}}{{1}}")


@given(st.integers(-(10**20), 10**20), st.integers(-(10**20), 10**20), st.sampled_from(SPELLINGS))
def test_numbers_are_exact_in_every_spelling(number, other, spelling):
    assert is_right(spelling.format(number), str(number))
    assert is_right(spelling.format(number), str(other)) is (number == other)
    assert is_same(str(number), spelling.format(number)) or "answer" in spelling or "boxed" in spelling
