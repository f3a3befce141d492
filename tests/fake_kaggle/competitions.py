"""Competitions: the download, submissions and their scores, the leaderboard."""

from __future__ import annotations

import csv
import io
import zipfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from tests.fake_kaggle.state import State
from tests.fake_kaggle.wire import SITE, Refused, Reply, Request, copy_once, file_entry, page, stamp, title_of, tree_files

TRUTH = "test_post_competition.csv"


@dataclass
class Submission:
    """A submission, `PENDING` until scored; scores are text, empty where the truth does not reach."""

    ref: int
    description: str
    file_name: str
    path: Path
    kernel: str | None = None
    date: datetime = field(default_factory=lambda: datetime.now(UTC))
    status: str = "PENDING"
    public_score: str = ""
    private_score: str = ""
    error: str = ""
    hidden: int = 0


class Competitions(State):
    """The calls about a competition."""

    def data_files(self) -> dict[str, Path]:
        """The competition's download, without the truth."""
        if self.data is None:
            return {}
        hidden = self.truth and self.truth.resolve()
        return {n: p for n, p in tree_files(self.data.resolve()).items() if p.name != TRUTH and p != hidden}

    def _ListCompetitions(self, _: Request) -> Request:
        own = {"id": 1, "ref": f"{SITE}/competitions/{self.competition}", "title": title_of(self.competition)}
        entered = {"userHasEntered": self.rules_accepted, "maxDailySubmissions": self.daily_limit}
        return {"competitions": [own | entered | {"isKernelsSubmissionsOnly": self.kernels_only}]}

    def _ListDataFiles(self, request: Request) -> Request:
        return page("files", [file_entry(name, path) for name, path in self.data_files().items()], request)

    def _DownloadDataFile(self, request: Request) -> Reply:
        self.entered()
        path = self.data_files().get(request["fileName"])
        if path is None:
            raise Refused(404, "File not found")
        return Reply(302, headers={"Location": self.link(path)})

    def _DownloadDataFiles(self, request: Request) -> Reply:
        self.entered()
        path = self.store / "downloads" / f"{self.competition}.zip"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(path, "w", strict_timestamps=False) as archive:
                for name, file in self.data_files().items():
                    archive.write(file, name)
        return Reply(302, headers={"Location": self.link(path, "archive.zip")})

    def _StartSubmissionUpload(self, request: Request) -> Request:
        self.entered()
        return self.start_upload(request["fileName"], request.get("contentLength", 0))

    def _CreateSubmission(self, request: Request) -> Request:
        if self.kernels_only:
            raise Refused(400, "This competition only accepts submissions from notebooks")
        blob = self.uploaded(request.get("blobFileTokens", ""))
        return self._submit(blob.path, blob.name, request)

    def _CreateCodeSubmission(self, request: Request) -> Request:
        session = self._session(request["kernelOwner"], request["kernelSlug"], request.get("kernelVersion"))
        path = session.outputs.get(request.get("fileName", ""))
        if path is None:
            raise Refused(400, f"Version {session.number} is {session.status} and has no output {request.get('fileName')}")
        return self._submit(path, path.name, request, f"{self.owner}/{request['kernelSlug']}/{session.number}")

    def _submit(self, path: Path, name: str, request: Request, kernel: str | None = None) -> Request:
        self.entered()
        if self._limits()["numAllowedNow"] <= 0:
            raise Refused(400, "You have reached the daily limit of submissions")
        ref = len(self.submissions) + 1
        kept = copy_once(path, self.store / "submissions" / f"{ref}.csv")
        message = request.get("submissionDescription", "")
        self.submissions.append(Submission(ref, message, name, kept, kernel, hidden=self.list_late))
        self.spawn(self._score, self.submissions[-1])
        return {"message": f"Successfully submitted to {title_of(self.competition)}", "ref": ref}

    def _score(self, submission: Submission) -> None:
        from melfold.combine.check import score_submission
        from melfold.errors import MelfoldError

        if not self.pause(self.score_delay):
            return
        error, scores = self._what_is_wrong(submission.path), {}
        try:
            if self.truth and not error:
                scores = score_submission(submission.path, self.truth)["lwlrap"].map("{:.5f}".format).to_dict()
        except MelfoldError as refused:
            error = str(refused)
        submission.public_score, submission.private_score = scores.get("Public", ""), scores.get("Private", "")
        if self.late and scores:  # only the Private half is scored after the deadline
            submission.public_score = "0.00000"
        submission.error = error
        submission.status = "ERROR" if error else "COMPLETE"

    def _what_is_wrong(self, path: Path) -> str:
        """What `sample_submission.csv` says against a file."""
        try:
            header, *rows = csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""))
        except (ValueError, csv.Error):
            return "Submission is not a CSV file"
        if any(len(row) != len(header) or any(v.strip().lower() in ("", "nan") for v in row) for row in rows):
            return "Submission contains null values"
        sample = self.data_files().get("sample_submission.csv")
        if sample is not None:
            wanted, *asked = csv.reader(io.StringIO(sample.read_text(encoding="utf-8-sig"), newline=""))
            if sorted(header) != sorted(wanted):
                return "Submission must have the columns of sample_submission.csv"
            if sorted(row[0] for row in rows) != sorted(row[0] for row in asked):
                return f"Submission must have the {len(asked)} rows of sample_submission.csv; it has {len(rows)}"
        return ""

    def _limits(self) -> dict[str, int]:
        today = sum(s.date.date() == datetime.now(UTC).date() for s in self.submissions)
        return {"numToday": today, "numTotal": len(self.submissions), "numAllowedNow": max(0, self.daily_limit - today)}

    def _GetSubmissionLimits(self, _: Request) -> Request:
        return self._limits()

    def _ListSubmissions(self, request: Request) -> Request:
        shown = [s for s in self.submissions if s.hidden <= 0]
        for submission in self.submissions:
            submission.hidden -= 1
        return page("submissions", [self._shown(s) for s in reversed(shown)], request)

    def _GetSubmission(self, request: Request) -> Request:
        for submission in self.submissions:
            if submission.ref == request.get("ref"):
                return self._shown(submission)
        raise Refused(404, "Submission not found")

    def _DownloadLeaderboard(self, _: Request) -> Reply:
        path = self.store / "downloads" / f"{self.competition}-leaderboard.zip"
        path.parent.mkdir(parents=True, exist_ok=True)
        head = "Rank,TeamId,TeamName,LastSubmissionDate,Score,SubmissionCount,TeamMemberUserNames"
        rows = [f'{n},{n},"team, {n}",2019-06-10 12:00:00,{score:.5f},3,user{n}' for n, score in enumerate(self.leaderboard, 1)]
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{self.competition}-publicleaderboard-2026-11-25.csv", "\ufeff" + "\n".join([head, *rows]) + "\n")
        return Reply(302, headers={"Location": self.link(path)})

    def _GetLeaderboard(self, request: Request) -> Request:
        scored = [s for s in self.submissions if s.public_score]
        best = sorted(scored, key=lambda s: float(s.public_score))[-1:]
        rows = [{"teamId": 1, "teamName": self.owner, "submissionDate": stamp(s.date), "score": s.public_score} for s in best]
        return page("submissions", rows, request)

    def _shown(self, s: Submission) -> Request:
        return {
            **{"ref": s.ref, "date": stamp(s.date), "description": s.description, "fileName": s.file_name},
            **{"status": s.status, "publicScore": s.public_score, "privateScore": s.private_score},
            **{"errorDescription": s.error, "totalBytes": s.path.stat().st_size},
            **{"submittedBy": self.owner, "teamName": self.owner},
        }
