"""Where things lie if nobody says otherwise; what the command line and the rooms below it both need to know."""

LEDGER = "out/paretune.db"
PROFILE = "out/profile.json"
