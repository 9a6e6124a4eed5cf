"""The report: complete runs, broken runs, hostile text."""

import html.parser
import json
import math
import re
import time

import numpy as np
import pytest

from rlhf_jax.evaluation import (
  figure_style,
  report,
  report_completions,
  report_data,
  report_headline,
  report_sections,
)
from tests.evaluation import synthetic_run

SCRIPT = "<script>alert('$x$ &amp;')</script><img src=http://evil.example/x>"


class _Page(html.parser.HTMLParser):
  """Tags, attributes, visible text and whether every element was closed."""

  VOID = {"meta", "br", "img", "link", "input", "hr"}

  def __init__(self, text: str):
    super().__init__()
    self.tags, self.attributes, self.texts, self.open = [], [], [], []
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs

  def handle_endtag(self, tag):
    assert self.open and self.open[-1] == tag, (tag, self.open)
    self.open.pop()

  def handle_data(self, data):
    if "style" not in self.open:
      self.texts.append(data)

  @property
  def text(self) -> str:
    return " ".join(" ".join(self.texts).split())


def read_page(run) -> _Page:
  page = _Page(report.write_report(run).read_text("utf-8"))
  assert not page.open
  return page


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
  return synthetic_run.make_run(tmp_path_factory.mktemp("whole_run"))


@pytest.fixture(scope="module")
def hacking_run(tmp_path_factory):
  return synthetic_run.make_run(
      tmp_path_factory.mktemp("hacking_run"), hacking=True
  )


@pytest.fixture(scope="module")
def page(whole_run):
  return read_page(whole_run)


def append(path, text: str) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("a", encoding="utf-8") as f:
    f.write(text)


# -- a complete run -----------------------------------------------------------


def test_headline_numbers_are_those_of_the_evaluation(page):
  assert (
      "True reward on 480 held-out prompts: 0.080 (Base) → 0.550 (SFT) → "
      "0.790 (PPO)." in page.text
  )
  assert (
      "PPO is above SFT by 0.240 [0.200, 0.280], paired by prompt" in page.text
  )
  assert "5.60 [5.30, 5.90] nats a completion, within the target of 6." in (
      page.text
  )
  assert "right on 76.1% [74.0%, 78.2%] of held-out pairs" in page.text
  assert "Over-optimisation" not in page.text


def test_every_section_of_a_whole_run_is_there(page):
  assert page.tags.count("svg") == 2 + 1 + 2 + 2 + 3 + 13
  assert "is not there" not in page.text
  assert "PPO against SFT" in page.text
  for text in ("2:30", "4:18", "0123abc", "update.cliprange", "ppo/ratio",
               "The ppo answer to harm 2."):
    assert text in page.text
  # Three prompts a family, the first ones.
  assert "answer to harm 3." not in page.text


def test_the_page_needs_nothing_but_itself(page):
  assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
  for name, value in page.attributes:
    if name in ("href", "src", "xlink:href"):
      assert value.startswith("#"), (name, value)
    assert not name.startswith("on")
  styles = [v for name, v in page.attributes if name == "style"]
  assert not any("url(http" in v for v in styles)


def test_equal_runs_give_equal_pages(whole_run):
  first = report.write_report(whole_run).read_bytes()
  assert report.write_report(whole_run).read_bytes() == first


def test_writing_takes_seconds_and_leaves_one_file(whole_run):
  start = time.perf_counter()
  path = report.write_report(whole_run)
  assert time.perf_counter() - start < 5
  assert path == whole_run / "report.html"
  assert path.stat().st_size < 2_000_000
  assert not list(whole_run.glob("*.partial"))


def test_ids_in_the_page_are_used_once_and_references_resolve(page):
  ids = [v for name, v in page.attributes if name == "id"]
  assert len(ids) == len(set(ids))
  for _, value in page.attributes:
    for target in re.findall(r"url\(#([^)]+)\)", value or ""):
      assert target in ids


def test_summary_text_is_aligned_and_plain(whole_run):
  text = report.summary_text(whole_run)
  lines = text.splitlines()
  table = [x for x in lines if x.startswith(("Base ", "SFT  ", "PPO  "))]
  assert [row.split()[1] for row in table] == ["0.080", "0.550", "0.790"]
  assert len({row.index("[") for row in table}) == 1
  assert "Training time 4:18 (pretrain 1:00" in text
  assert max(map(len, lines)) <= 80


def test_what_rounds_to_zero_has_no_minus_sign(tmp_path):
  run = synthetic_run.make_run(tmp_path)
  path = run / "evaluate" / "evaluation.json"
  tiny = dict(mean=-2e-6, low=-3e-6, high=-1e-6)
  evaluation = json.loads(path.read_text())
  for policy in evaluation["policies"].values():
    policy |= {"true_reward": tiny, "score": tiny, "kl": tiny}
    policy["parts"] = {"form": -2e-6}
  for pair in evaluation["paired"]:
    pair |= {"difference": tiny, "length_controlled": tiny}
  path.write_text(json.dumps(evaluation))
  for text in (report.summary_text(run), read_page(run).text):
    assert "0.000" in text and not re.search(r"-0\.0+\b", text)


def test_an_output_elsewhere_is_written_there(whole_run, tmp_path):
  path = report.write_report(whole_run, tmp_path / "page.html")
  assert path == tmp_path / "page.html" and path.exists()


# -- over-optimisation --------------------------------------------------------


def test_reward_hacking_is_named_with_its_peak(hacking_run):
  run = report_data.read_run(hacking_run)
  found = report_headline.find_overoptimisation(run)
  # By a loop: the best mean of three evaluations in a row.
  curve = run.curve("ppo", "eval/true_reward")
  best, best_step = -math.inf, None
  for i in range(1, len(curve.values) - 1):
    mean = sum(curve.values[i - 1:i + 2]) / 3
    if mean > best:
      best, best_step = mean, curve.steps[i]
  assert found.is_notable
  assert found.peak_step == best_step
  assert abs(found.peak_step - synthetic_run.PEAK) <= 20
  assert found.peak_reward == pytest.approx(best)
  assert found.final_reward == pytest.approx(sum(curve.values[-3:]) / 3)
  assert found.final_score > found.peak_score
  assert "Over-optimisation: the true reward peaked at PPO iteration" in (
      report.summary_text(hacking_run)
  )
  assert "PPO is BELOW SFT by 0.240 [0.200, 0.280], paired" in (
      report.summary_text(hacking_run)
  )


def test_a_noisy_plateau_is_not_called_over_optimisation(whole_run):
  run = report_data.read_run(whole_run)
  assert not report_headline.find_overoptimisation(run).is_notable


def test_the_overoptimisation_plot_is_a_png(hacking_run, tmp_path):
  path = tmp_path / "plot.png"
  report.plot_overoptimisation(hacking_run, path)
  assert path.read_bytes().startswith(b"\x89PNG")


def test_the_plot_says_what_it_lacks(tmp_path):
  append(tmp_path / "ppo" / "metrics.jsonl", '{"step": 1, "ppo/score": 1.0}\n')
  with pytest.raises(ValueError, match="metrics.jsonl.*eval/true_reward"):
    report.plot_overoptimisation(tmp_path, tmp_path / "x.png")


# -- runs that are not whole --------------------------------------------------

FILES = (
    "config.json", "versions.json", "pretrain/metrics.jsonl",
    "sft/metrics.jsonl", "reward/metrics.jsonl", "ppo/metrics.jsonl",
    "ppo/timing.jsonl", "reward/calibration.json", "evaluate/evaluation.json",
    "evaluate/completions.jsonl",
)


def test_an_empty_run_says_which_stage_writes_what(tmp_path):
  text = read_page(tmp_path).text
  assert "The policies have not been evaluated yet." in text
  assert "evaluate/evaluation.json is not there: the evaluate stage" in text
  assert "reward/calibration.json is not there: the reward stage" in text
  assert "The policies have not" in report.summary_text(tmp_path)


# By pairs: drawing whole pages is what takes the time here.
@pytest.mark.parametrize("missing", zip(FILES[::2], FILES[1::2]))
def test_each_file_may_be_missing(tmp_path, missing):
  run = synthetic_run.make_run(tmp_path)
  for name in missing:
    (run / name).unlink()
  read_page(run)
  report.summary_text(run)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [
    b"", b"{", b"[1, 2]", b"null\n3\n", b'{"step": {}, "policies": 3}\n',
    b'{"bins": [{}, 1], "accuracy": "x", "policies": {"a": 1, "b": {}}}',
    b"\xff\xfe\x00{}", b"[" * 3000,
])
def test_each_file_may_hold_anything(tmp_path, name, content):
  (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
  (tmp_path / name).write_bytes(content)
  read_page(tmp_path)
  report.summary_text(tmp_path)


def test_a_missing_run_folder_is_an_error(tmp_path):
  with pytest.raises(FileNotFoundError, match="no such run folder"):
    report.write_report(tmp_path / "nowhere")


def test_a_half_written_last_line_is_left_out_and_named(whole_run, tmp_path):
  run = synthetic_run.make_run(tmp_path)
  before = report_data.read_run(run).curve("ppo", "ppo/score")
  num_lines = len((run / "ppo/metrics.jsonl").read_text().splitlines())
  append(run / "ppo" / "metrics.jsonl", '{"step": 999, "ppo/score": 5')
  data = report_data.read_run(run)
  assert np.array_equal(data.curve("ppo", "ppo/score").values, before.values)
  assert data.problems == (
      f"ppo/metrics.jsonl:{num_lines + 1}: the last line is half-written (the "
      "run was stopped, or is still going); it was left out.",
  )
  assert "the last line is half-written" in read_page(run).text


def test_garbage_between_lines_is_named_by_line(tmp_path):
  append(
      tmp_path / "sft" / "metrics.jsonl",
      '{"step": 1, "sft/loss": 3.0}\nnot json\n[]\n'
      '{"step": 2, "sft/loss": 2.0}\n',
  )
  data = report_data.read_run(tmp_path)
  assert list(data.curve("sft", "sft/loss").values) == [3.0, 2.0]
  assert data.problems == (
      "sft/metrics.jsonl: not a JSON object, left out: line 2, 3.",
  )


@pytest.mark.parametrize("nan", ["NaN", '"NaN"', '"Infinity"', "1e999"])
def test_nan_metrics_leave_gaps_and_are_named(tmp_path, nan):
  append(
      tmp_path / "ppo" / "metrics.jsonl",
      f'{{"step": 1, "ppo/kl": 0.5}}\n{{"step": 2, "ppo/kl": {nan}}}\n'
      f'{{"step": 3, "ppo/kl": 0.7, "ppo/score": {nan}}}\n',
  )
  data = report_data.read_run(tmp_path)
  assert list(data.curve("ppo", "ppo/kl").steps) == [1, 3]
  assert data.curve("ppo", "ppo/score") is None
  assert data.problems[0] == (
      "ppo/metrics.jsonl: ppo/kl is NaN or infinite at 1 of 3 steps, first at "
      "step 2."
  )
  said = "ppo/score is NaN or infinite at 1 of 1 steps"
  assert said in read_page(tmp_path).text


def test_a_step_that_a_resumed_run_wrote_again_counts_once(tmp_path):
  append(
      tmp_path / "sft" / "metrics.jsonl",
      '{"step": 2, "sft/loss": 9}\n{"step": 1, "sft/loss": 3}\n'
      '{"step": 2, "sft/loss": 2}\n',
  )
  curve = report_data.read_run(tmp_path).curve("sft", "sft/loss")
  assert list(curve.steps) == [1, 2] and list(curve.values) == [3.0, 2.0]


def test_time_is_counted_by_step_or_in_whole(tmp_path):
  append(
      tmp_path / "sft" / "timing.jsonl",
      '{"step": 10, "seconds_per_step": 0.5}\n'
      '{"step": 30, "seconds_per_step": 0.1}\n',
  )
  append(tmp_path / "evaluate" / "timing.jsonl", '{"step": 0, "seconds": 7}\n')
  seconds = report_data.read_run(tmp_path).seconds
  assert seconds == {"sft": pytest.approx(7.0), "evaluate": 7.0}
  assert [report_headline.clock(s) for s in (7, 61.6, 3723)] == [
      "0:07", "1:02", "1:02:03"
  ]


def test_without_a_judge_the_score_is_told_and_that_it_is_no_truth(tmp_path):
  policies = {"sft": {"score": {"mean": -0.5}}, "ppo": {"score": {"mean": 1}}}
  synthetic_run.write_json(
      tmp_path / "evaluate" / "evaluation.json",
      {"num_prompts": 1200, "policies": policies},
  )
  told = report.summary_text(tmp_path)
  assert "score on 1,200 held-out prompts: -0.500 (SFT) → 1.000 (PPO)." in told
  assert "whether a higher score is better is not known" in told


def test_folders_beside_the_stages_are_no_part_of_the_run(tmp_path):
  for name in ("ppo2", "judge", "sft"):
    append(
        tmp_path / name / "timing.jsonl",
        '{"step": 2, "seconds_per_step": 50}\n',
    )
    append(tmp_path / name / "metrics.jsonl", '{"step": 2, "eval/loss": 1}\n')
  run = report_data.read_run(tmp_path)
  assert run.seconds == {"sft": 100, "judge": 100}
  assert list(run.curves) == ["sft", "judge"]
  assert "Training time 3:20 (sft 1:40" in report.summary_text(tmp_path)


def test_stages_that_were_run_one_by_one_show_their_configs(tmp_path):
  synthetic_run.write_json(tmp_path / "sft" / "config.json", {"lr": 0.25})
  assert report_data.read_run(tmp_path).config == {"sft": {"lr": 0.25}}
  assert "Config: sft" in read_page(tmp_path).text


@pytest.mark.parametrize("policies, difference, expected", [
    ({"sft": {"mean": 0.5}, "ppo": {"mean": 0.6}}, None,
     "PPO has no interval to compare with SFT"),
    ({"sft": {"mean": 0.5}, "ppo": {"mean": 0.6}}, {"mean": 0.1},
     "PPO has no interval to compare with SFT"),
    ({"sft": {"mean": 0.5}, "ppo": {"mean": 0.55}},
     synthetic_run.interval(0.05, 0.06),
     "PPO is not clearly apart from SFT: 0.050 [-0.010, 0.110]"),
    ({"sft": {"mean": 0.5}, "ppo": {"mean": 0.55}},
     synthetic_run.interval(0.05, 0.04),
     "PPO is above SFT by 0.050 [0.010, 0.090], paired by prompt."),
    ({"sft": {"mean": 0.5, "low": math.nan, "high": math.nan}}, None,
     "0.500 (SFT)."),
    ({"sft": synthetic_run.interval(-0.5, 0.1)}, None, "-0.500 (SFT)."),
    ({"sft": {"mean": "NaN"}}, None, "The evaluation measured no true reward."),
])
def test_the_headline_claims_no_more_than_the_intervals(
    tmp_path, policies, difference, expected
):
  synthetic_run.write_json(tmp_path / "evaluate" / "evaluation.json", {
      "policies": {k: {"true_reward": x} for k, x in policies.items()},
      "paired": [
          {"policy": "ppo", "baseline": "sft", "win": 0.5, "tie": 0, "loss": 0,
           "difference": difference},
      ],
  })
  assert expected in read_page(tmp_path).text
  assert expected in " ".join(report.summary_text(tmp_path).split())


@pytest.mark.parametrize("kl, said", [
    (synthetic_run.interval(5.0, 0.5), ", within the target of 6."),
    (synthetic_run.interval(6.2, 0.5), ", not clearly above the target of 6."),
    (synthetic_run.interval(8.0, 0.5), ", ABOVE the target of 6."),
])
def test_kl_is_held_against_its_target(tmp_path, kl, said):
  synthetic_run.write_json(tmp_path / "evaluate" / "evaluation.json", {
      "kl_target": 6,
      "policies": {"ppo": {"true_reward": {"mean": 0.5}, "kl": kl}},
  })
  assert said in read_page(tmp_path).text


# -- text that would like to be more ------------------------------------------


def run_with(rows) -> report_data.RunData:
  return report_data.RunData(
      name="run", config=None, versions=None, curves={}, seconds={},
      calibration=None, evaluation=None, completions=tuple(rows), problems=(),
  )


def completion_rows(completion: str, policies=("sft", "ppo")):
  return [
      {"prompt": "Q", "family": "email", "policy": p, "completion": completion}
      for p in policies
  ]


def test_html_in_completions_and_names_is_shown_not_run(tmp_path):
  synthetic_run.write_json(tmp_path / "config.json", {SCRIPT: {SCRIPT: SCRIPT}})
  synthetic_run.write_json(tmp_path / "versions.json", {"commit": SCRIPT})
  append(tmp_path / "ppo" / "metrics.jsonl", json.dumps(
      {"step": 1, SCRIPT: 1.0, "ppo/score": 1.0}) + "\n")
  value = synthetic_run.interval(0.5, 0.1)
  synthetic_run.write_json(tmp_path / "evaluate" / "evaluation.json", {
      "judge": SCRIPT,
      "policies": {SCRIPT: {"true_reward": value, "families": {SCRIPT: value},
                            "parts": {SCRIPT: 1.0}}},
      "paired": [{"policy": SCRIPT, "baseline": SCRIPT, "win": 1, "tie": 0,
                  "loss": 0}],
  })
  synthetic_run.write_rows(
      tmp_path / "evaluate" / "completions.jsonl",
      [{"prompt": SCRIPT, "family": SCRIPT, "policy": SCRIPT,
        "completion": SCRIPT + "</pre></div>\x00\ud800\u202e"}],
  )
  page = read_page(tmp_path)
  assert not {"script", "img"} & set(page.tags)
  assert page.text.count(SCRIPT) >= 10
  assert "</pre></div>␀\ufffd\ufffd" in page.text


def test_a_very_long_completion_is_folded_and_bounded(tmp_path):
  synthetic_run.write_rows(
      tmp_path / "evaluate" / "completions.jsonl",
      completion_rows("word " * 400_000),
  )
  page = read_page(tmp_path)
  assert "more characters left out" in page.text
  assert "19,4" in page.text and "more characters" in page.text
  assert (tmp_path / "report.html").stat().st_size < 200_000


def test_all_of_a_folded_completion_is_there():
  text = "".join(f"{i} " for i in range(400))
  row = {"prompt": "Q", "policy": "ppo", "completion": text}
  run = run_with([row])
  (prompt,) = report_completions.completion_groups(run)["prompts"]
  (shown,) = prompt.completions
  assert shown.head + shown.tail == text
  assert len(shown.head) == report_completions.VISIBLE_CHARACTERS


def test_prompts_that_every_policy_answered_come_first():
  rows = [
      {"prompt": f"Q{i}", "policy": p, "completion": "x", "family": "f"}
      for p in ("sft", "ppo") for i in range(6) if (p, i) != ("ppo", 0)
  ]
  run = run_with(rows)
  groups = report_completions.completion_groups(run)
  assert [row.prompt for row in groups["f"]] == ["Q1", "Q2", "Q3"]
  assert [c.policy for c in groups["f"][0].completions] == ["SFT", "PPO"]


def test_names_that_no_font_has_and_dollars_are_drawn(tmp_path):
  value = synthetic_run.interval(0.5, 0.1)
  synthetic_run.write_json(tmp_path / "evaluate" / "evaluation.json", {
      "policies": {"方針$_{x": {"true_reward": value,
                             "families": {"家族 $\\frac": value}}},
  })
  assert "方針$_{x" in read_page(tmp_path).text


# -- drawing ------------------------------------------------------------------


@pytest.mark.parametrize("num", [1, 2, 81, 5000])
def test_curves_of_any_length_are_drawn(tmp_path, num):
  synthetic_run.write_rows(tmp_path / "ppo" / "metrics.jsonl", [
      {"step": i, "ppo/score": 1e-7 * i, "eval/true_reward": 0.5,
       "eval/kl": 1.0, "eval/score": -1e9 * i}
      for i in range(num)
  ])
  page = read_page(tmp_path)
  assert page.tags.count("svg") == 5
  assert (tmp_path / "report.html").stat().st_size < 1_000_000


def test_averages_weigh_every_point_once():
  values = np.random.default_rng(0).normal(size=103)
  got = figure_style.averaged(report_data.Curve(np.arange(103), values), 10)
  edges = [int(103 * i / 10) for i in range(11)]
  for i, (low, high) in enumerate(zip(edges, edges[1:])):
    assert got.values[i] == pytest.approx(sum(values[low:high]) / (high - low))
  assert np.all(np.diff(got.steps) > 0)


@pytest.mark.parametrize("value, text", [
    (0.0, "0"), (-0.125, "−0.125"), (9999, "9999"), (12_000, "12k"),
    (2.5e6, "2.5M"), (1e9, "1e+09"), (1e-6, "1e−06"),
])
def test_ticks_are_short(value, text):
  assert figure_style.tick(value) == text


def test_metrics_that_no_figure_shows_are_listed(whole_run):
  tables = report_sections.other_metrics(report_data.read_run(whole_run))
  assert tables["ppo"] == [("ppo/ratio", [1.0, 1.0, 1.0, 1.0])]
  name, (_, _, least, most) = tables["sft"][0]
  assert name == "sft/gradient_norm" and least < most
