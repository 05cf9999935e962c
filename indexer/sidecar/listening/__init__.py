"""People's Spotify history, archived every hour: Spotify itself keeps a person's last 50 plays alone.

    vault       people's tokens, encrypted at rest
    cooldown    kinds of failure, and how long a person is left alone after them
    people      who is connected: places, leases, tokens, outcomes
    plays       what was played, read and stored
    poll        one person's poll: a fresh token, page by page
    archive     a batch of people, each in isolation
    schedule    the hourly jobs and the two routes of a scheduler
    session     who a browser belongs to
    connect     sign-in by Spotify
    reads       history, top, state, deletion
    export      all of it, line by line
    page        a person's own page
"""
