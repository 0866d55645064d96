"""Where things lie if nobody says otherwise; the rooms below are told."""

LEDGER = "out/paretune.db"
PROFILE = "out/profile.json"
