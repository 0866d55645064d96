"""How long things take: profiles, step-time model, simulator, replay against a live server."""
