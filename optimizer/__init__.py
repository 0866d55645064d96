"""What to try, which points win, which one to deploy, and when to do it again."""
