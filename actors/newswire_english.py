"""English words and sentences of the newswire.

Few hundred words on purpose: a model of a million parameters learns them in minutes. Within a
topic the same nouns come back, and every sentence carries one or two facts. No line begins with a
fact: tokenizers give a word another token where no space stands before it, and the same fact
should be the same token everywhere, so that it can be copied.
"""

from __future__ import annotations

from actors.newswire_lexicon import Lexicon, topic, words

STORM = topic(
    """\
Storm floods {number} homes in {place}
Storm in {place} leaves {number} homes under water
Rain floods {number} homes as storm hits {place}

A storm flooded {number} homes in {place} on {day}, said {first} {person} of {org} Rescue.
On {day} rain put {number} homes in {place} under water, {first} {person} of {org} Rescue said.
Chief {first} {person} of {org} Rescue counted {number} flooded homes in {place} on {day}.

Water rose through the streets of {place} during the night.
Strong wind and rain damaged {number} homes near the river.
The river in {place} broke its banks before dawn.

Boats from {org} Rescue carried families to dry ground.
A shelter of {org} Rescue is open to people from the {number} homes.
Crews of {org} Rescue pumped water out of {number} homes.

Chief {person} said the worst of the storm was over.
The rain came faster than expected, {person} said.
Chief {person} thanked the people who filled sand bags.

Roads in {place} should open again by {day}.
Crews of {org} Rescue will check the river walls on {day}.
More rain may reach {place} before {day}.
"""
)

FOOTBALL = topic(
    """\
Win in {place} takes {org} United to {number} points
Late goal in {place} takes {org} United to {number} points
Fans in {place} see {org} United reach {number} points

With a win in {place} on {day} {org} United has {number} points, coach {first} {person} said.
A late goal in {place} on {day} took {org} United and coach {first} {person} to {number} points.
Coach {first} {person} saw {org} United win in {place} on {day} to reach {number} points.

The crowd in {place} saw both goals after the break.
A header in the last minute decided the match in {place}.
The win lifts the team to {number} points in the league.

Players of {org} United had more of the ball from the start.
The keeper of {org} United saved two shots.
With {number} points, {org} United is second in the table.

Coach {person} praised the young players after the match.
The team never stopped running, {person} said.
Coach {person} called it the best match of the season.

The next match of {org} United is on {day}.
The players return to {place} for the cup on {day}.
Coach {person} hopes to have the captain back by {day}.
"""
)

ELECTION = topic(
    """\
The {org} Party wins {place} by {number} votes
Just {number} votes decide {place} election for {org} Party
Voters in {place} elect {org} Party by {number} votes

The {org} Party won {place} by {number} votes on {day}, and {first} {person} becomes mayor.
{first} {person} of the {org} Party became mayor of {place} on {day} by {number} votes.
Voters in {place} chose {first} {person} of the {org} Party as mayor on {day} by {number} votes.

Officials in {place} counted the ballots twice.
The gap of {number} votes was the smallest in years.
Long lines formed at the polls across {place}.

The {org} Party promised lower taxes and more parks.
Members of the {org} Party cheered the gap of {number} votes.
The {org} Party now holds most seats on the council.

Mayor {person} promised to work for all voters.
The people asked for change, {person} said.
Mayor {person} thanked the losing side for a fair campaign.

The new council of {place} meets on {day}.
Mayor {person} takes the oath on {day}.
The {org} Party will name its council team on {day}.
"""
)

FACTORY = topic(
    """\
Carmaker {org} Motors to add {number} jobs in {place}
Plant of {org} Motors in {place} gets {number} jobs
Some {number} new jobs at {org} Motors in {place}

Carmaker {org} Motors will add {number} jobs in {place}, director {first} {person} said on {day}.
Director {first} {person} of {org} Motors announced {number} jobs for the plant in {place} on {day}.
The {org} Motors plant in {place} gets {number} jobs, director {first} {person} said on {day}.

The plant in {place} will build electric cars.
Most of the {number} jobs are for skilled workers.
A second line of cars will start at the {place} plant.

Carmaker {org} Motors sold more cars than ever last year.
Experts of {org} Motors will train the {number} workers.
Shares of {org} Motors rose after the news.

Director {person} said demand for cars was strong.
Good workers are hard to find, {person} said.
Director {person} promised fair pay at the plant.

Workers in {place} can apply from {day}.
Carmaker {org} Motors will show its new car on {day}.
The union of {place} meets {person} on {day}.
"""
)

FIRE = topic(
    """\
Fire in {place} drives out {number} families
Some {number} families flee fire in {place}
Tower fire in {place} drives {number} families out

Fire drove out {number} families in {place} on {day}, chief {first} {person} of {org} Brigade said.
Under {first} {person} the {org} Brigade saved {number} families from a fire in {place} on {day}.
Chief {first} {person} of {org} Brigade said {number} families fled a fire in {place} on {day}.

Smoke could be seen all over {place}.
The flames started in a kitchen of the {place} tower.
All {number} families left the tower unhurt.

Crews of {org} Brigade needed four hours to stop the flames.
Ladders of {org} Brigade reached the top floor.
Helpers of {org} Brigade found beds for the {number} families.

Chief {person} said an old heater caused the fire.
The smoke alarms saved lives, {person} said.
Chief {person} asked people to stay away from the tower.

Police in {place} will inspect the tower on {day}.
The {number} families may return home on {day}.
Crews of {org} Brigade will test all alarms by {day}.
"""
)

SCHOOL = topic(
    """\
The {org} Academy in {place} hires {number} teachers
Some {number} teachers join {org} Academy in {place}
School in {place} gets {number} teachers

The {org} Academy in {place} hired {number} teachers on {day}, head teacher {first} {person} said.
Head teacher {first} {person} welcomed {number} teachers to {org} Academy in {place} on {day}.
On {day} {number} teachers joined {org} Academy in {place}, head teacher {first} {person} said.

Parents in {place} had asked for smaller classes.
The {number} teachers will teach science and music.
Classes in {place} had grown too large.

The {org} Academy also bought books and computers.
Pupils of {org} Academy painted a sign for the {number} teachers.
The {org} Academy has the best exam results in the region.

Head teacher {person} said every pupil would get more help.
Small classes make happy pupils, {person} said.
Head teacher {person} showed the library to all.

Lessons in {place} start again on {day}.
The {org} Academy invites all parents on {day}.
Head teacher {person} will present the exam plan on {day}.
"""
)

RAIL = topic(
    """\
Operator {org} Rail adds {number} trains in {place}
Passengers in {place} get {number} trains from {org} Rail
Some {number} new trains for {place} from {org} Rail

Operator {org} Rail adds {number} trains in {place} from {day}, manager {first} {person} said.
Manager {first} {person} of {org} Rail announced {number} more trains for {place} from {day}.
From {day} {number} more trains stop in {place}, said manager {first} {person} of {org} Rail.

The station in {place} is full every morning.
The {number} trains will run early and late.
A new platform was built at {place} station.

Operator {org} Rail keeps ticket prices as they are.
A loan to {org} Rail paid for the {number} trains.
Drivers of {org} Rail trained on the line for weeks.

Manager {person} said delays would be rare.
Nobody should have to stand, {person} said.
Manager {person} rode the first train with passengers.

Tickets for trains from {place} go on sale on {day}.
Operator {org} Rail will print the timetable by {day}.
Track work near {place} ends on {day}.
"""
)

HARVEST = topic(
    """\
Dry summer hurts {number} farms near {place}
Wheat dries on {number} farms near {place}
Drought in {place} hits {number} farms

A drought hit {number} farms near {place}, buyer {first} {person} of {org} Foods said on {day}.
Some {number} farms near {place} lost their wheat, {first} {person} of {org} Foods said on {day}.
Grocer {org} Foods will help {number} farms near {place}, buyer {first} {person} said on {day}.

Fields around {place} turned brown in early summer.
Wheat on the {number} farms dried before it was ripe.
Wells near {place} are almost empty.

Grocer {org} Foods will pay farmers a higher price.
Trucks of {org} Foods bring hay to the {number} farms.
Mills of {org} Foods now buy wheat from abroad.

Buyer {person} said bread would cost more.
Farmers need water now, {person} said.
Buyer {person} walked the fields with the farmers.

Farmers in {place} meet the minister on {day}.
Grocer {org} Foods will set its wheat price on {day}.
Water trucks should reach {place} by {day}.
"""
)

MUSEUM = topic(
    """\
The {org} Gallery shows {number} lost paintings in {place}
Some {number} lost paintings go on show in {place}
Visitors in {place} see {number} lost paintings

The {org} Gallery in {place} showed {number} lost paintings on {day}, curator {first} {person} said.
Curator {first} {person} of {org} Gallery showed {number} lost paintings in {place} on {day}.
On {day} {number} lost paintings went to {org} Gallery in {place}, curator {first} {person} said.

Visitors in {place} waited an hour to get in.
The {number} paintings were found in an attic.
Art lovers from many countries came to {place}.

The {org} Gallery cleaned every frame by hand.
Guards of {org} Gallery watch the {number} paintings day and night.
The {org} Gallery lets children in for free.

Curator {person} called the colours as bright as new.
Art belongs to everyone, {person} said.
Curator {person} spent ten years on the search.

The show in {place} closes on {day}.
The {org} Gallery will sell prints from {day}.
Curator {person} gives a talk on the paintings on {day}.
"""
)

HOSPITAL = topic(
    """\
The {org} Clinic opens {number} beds in {place}
Patients in {place} get {number} beds at {org} Clinic
Some {number} new beds for patients in {place}

The {org} Clinic opened {number} beds in {place} on {day}, doctor {first} {person} said.
Doctor {first} {person} opened {number} new beds at {org} Clinic in {place} on {day}.
From {day} {place} has {number} more beds, doctor {first} {person} of {org} Clinic said.

Patients in {place} used to wait for months.
The {number} beds are for heart and lung patients.
The old ward in {place} had become too small.

The {org} Clinic also hired nurses for the ward.
Gifts to {org} Clinic paid for the {number} beds.
The {org} Clinic runs its ward on solar power.

Doctor {person} said nurses would have more time.
Every patient gets a window, {person} said.
Doctor {person} thanked the nurses for their patience.

The first patients from {place} arrive on {day}.
The {org} Clinic opens its doors to visitors on {day}.
Doctor {person} will operate in the ward from {day}.
"""
)


ENGLISH = Lexicon(
    language="en",
    values={
        "place": words(
            "Arden Bexley Carlow Dover Elgin Forres Galway Hilton Kelso Linden Marlow Norwick"
            " Oakham Preston Redhill Selby Thorne Upton Walden York"
        ),
        "number": words("12 14 15 18 21 24 27 30 32 35 36 40 42 45 48 50 54 60 64 70 72 80 85 96"),
        "org": words(
            "Atlas Beacon Cedar Crown Delta Falcon Granite Harbour Meridian Nova Orion Pioneer"
            " Sterling Summit Union Vertex"
        ),
        "person": words(
            "Adams Baker Chen Diaz Evans Fischer Garcia Haddad Ito Jensen Khan Lopez Moreau"
            " Nolan Okoro Patel Quinn Rossi Silva Tanaka"
        ),
        "first": words(
            "Anna Ben Clara David Elena Frank Grace Hugo Irene James Laura Marco Nina Omar"
            " Paula Sam"
        ),
        "day": words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    },
    topics={
        "storm": STORM,
        "football": FOOTBALL,
        "election": ELECTION,
        "factory": FACTORY,
        "fire": FIRE,
        "school": SCHOOL,
        "rail": RAIL,
        "harvest": HARVEST,
        "museum": MUSEUM,
        "hospital": HOSPITAL,
    },
    fillers=(
        "It is what it is, observers noted.",
        "Time will tell, as they say.",
        "Needless to say, this is what it is.",
        "At the end of the day, a lot can happen.",
        "As everyone knows, things are the way they are.",
        "Only time will tell what comes next.",
        "In other words, it is what it is.",
        "All things considered, many things were considered.",
        "It goes without saying, observers noted.",
        "Be that as it may, time will tell.",
    ),
    filler_marks=(
        "it is what it is",
        "is what it is",
        "time will tell",
        "as they say",
        "Needless to say",
        "At the end of the day",
        "As everyone knows",
        "All things considered",
        "goes without saying",
        "observers noted",
        "In other words",
        "Be that as it may",
    ),
    joiner=" ",
    sentence_end=r"(?<=[.!?])\s+|\n+",
)
