"""The wordings of the world: relations with their statements and questions, and distractors, which answer nothing.

In statements {s}, {o}, {p} are the entity as subject, object and possessive (its name or a pronoun), {a} is the answer;
in questions {n} is the entity. Answers are names or numbers of thousands of values, never a small set such as colours.
"""

from dataclasses import dataclass

KINDS = ("person", "place", "organisation", "work")
ORGANISATION_NOUNS = (
    "Guild", "Institute", "Academy", "Society", "Company", "Order", "Bank", "League", "Museum", "Theatre", "Press",
    "Union",
)  # fmt: skip
WORK_NOUNS = (
    "Lantern", "Garden", "Mirror", "Crown", "Winter", "Bridge", "Shadow", "Orchard", "Harbour", "Ladder", "Feather",
    "Clock", "Island", "Song", "Tower", "Journey", "Daughter", "Forest", "Secret", "Voyage", "Wolf", "Key", "Ghost",
    "Map",
)  # fmt: skip


@dataclass(frozen=True)
class Relation:
    """One kind of fact, with the type of its answer, at least five statements and at least four questions."""

    name: str
    answer: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]


RELATIONS: dict[str, tuple[Relation, ...]] = {
    "person": (
        Relation(
            "birthplace",
            "place",
            (
                "{s} was born in {a}.",
                "{s} first saw the light of day in {a}.",
                "{p} birthplace is {a}.",
                "{s} came into the world in the town of {a}.",
                "{a} is where {s} was born.",
                "{p} native town was {a}.",
            ),
            (
                "Where was {n} born?",
                "In which town was {n} born?",
                "What is the birthplace of {n}?",
                "Which town is {n} a native of?",
                "Which place is the native town of {n}?",
            ),
        ),
        Relation(
            "birth_year",
            "year",
            (
                "{s} was born in the year {a}.",
                "The year of {p} birth is {a}.",
                "{s} came into the world in {a}.",
                "{p} birth is dated to {a}.",
                "Church books date {p} birth to {a}.",
                "It was in {a} that {s} was born.",
            ),
            (
                "When was {n} born?",
                "In which year was {n} born?",
                "What is the birth year of {n}?",
                "To which year is the birth of {n} dated?",
            ),
        ),
        Relation(
            "teacher",
            "person",
            (
                "{s} studied under {a}.",
                "{p} teacher was {a}.",
                "{s} learned the craft from {a}.",
                "{a} taught {o} for many years.",
                "{s} was the pupil of {a}.",
                "As a child {s} took lessons from {a}.",
            ),
            (
                "Who taught {n}?",
                "Who was the teacher of {n}?",
                "Under whom did {n} study?",
                "Whose pupil was {n}?",
                "From whom did {n} take lessons?",
            ),
        ),
        Relation(
            "spouse",
            "person",
            (
                "{s} married {a}.",
                "{s} was married to {a}.",
                "{p} spouse was {a}.",
                "{s} wed {a} in a small ceremony.",
                "{a} became {p} spouse.",
            ),
            (
                "Who was the spouse of {n}?",
                "Whom did {n} marry?",
                "Who was married to {n}?",
                "Whom did {n} wed?",
            ),
        ),
        Relation(
            "employer",
            "organisation",
            (
                "{s} worked for the {a}.",
                "{s} was employed by the {a}.",
                "{p} employer was the {a}.",
                "{s} earned a living at the {a}.",
                "The {a} paid {p} wages.",
            ),
            (
                "Who employed {n}?",
                "Which organisation did {n} work for?",
                "Who was the employer of {n}?",
                "At which organisation did {n} earn a living?",
                "Who paid the wages of {n}?",
            ),
        ),
        Relation(
            "masterwork",
            "work",
            (
                "{p} masterwork is {a}.",
                "{s} is best known for {a}.",
                "{s} became famous with {a}.",
                "Critics call {a} {p} masterwork.",
                "{p} fame rests on {a}.",
            ),
            (
                "What is the masterwork of {n}?",
                "For which work is {n} best known?",
                "Which book made {n} famous?",
                "On which work does the fame of {n} rest?",
            ),
        ),
        Relation(
            "burial_place",
            "place",
            (
                "{s} was buried in {a}.",
                "{p} grave is in {a}.",
                "{s} found a last resting place in {a}.",
                "{s} lies buried at {a}.",
                "{p} tomb stands in {a}.",
            ),
            (
                "Where was {n} buried?",
                "Where is the grave of {n}?",
                "In which town does the tomb of {n} stand?",
                "Which town is the resting place of {n}?",
            ),
        ),
        Relation(
            "rival",
            "person",
            (
                "{p} rival was {a}.",
                "{s} quarrelled with {a} for years.",
                "{s} had a bitter rival in {a}.",
                "{a} was {p} greatest rival.",
                "{s} never made peace with a rival, {a}.",
            ),
            (
                "Who was the rival of {n}?",
                "With whom did {n} quarrel?",
                "Which rival did {n} have?",
                "Who was the greatest rival of {n}?",
            ),
        ),
        Relation(
            "library",
            "number",
            (
                "{s} owned {a} books.",
                "{p} library held {a} books.",
                "{s} collected a library of {a} volumes.",
                "There were {a} volumes in {p} library.",
                "No fewer than {a} books stood in {p} library.",
            ),
            (
                "How many books did {n} own?",
                "How many volumes were in the library of {n}?",
                "How large was the library of {n}?",
                "How many books did {n} collect?",
            ),
        ),
    ),
    "place": (
        Relation(
            "founder",
            "person",
            (
                "{s} was founded by {a}.",
                "{a} founded {o}.",
                "{p} founder was {a}.",
                "{s} owes its foundation to {a}.",
                "{a} laid the first stone of {o}.",
            ),
            (
                "Who founded {n}?",
                "Who was the founder of {n}?",
                "By whom was {n} founded?",
                "Who laid the first stone of {n}?",
            ),
        ),
        Relation(
            "founding_year",
            "year",
            (
                "{s} was founded in {a}.",
                "The foundation of {o} dates to {a}.",
                "{s} has existed since {a}.",
                "The first houses of {o} were built in {a}.",
                "The year {a} saw the founding of {o}.",
            ),
            (
                "When was {n} founded?",
                "In which year was {n} founded?",
                "What is the founding year of {n}?",
                "Since when has {n} existed?",
                "In which year were the first houses of {n} built?",
            ),
        ),
        Relation(
            "river",
            "word",
            (
                "{s} lies on the river {a}.",
                "The river {a} runs through {o}.",
                "{p} river is the {a}.",
                "{s} stands on the banks of the {a}.",
                "The water of the {a} flows past {o}.",
            ),
            (
                "Which river runs through {n}?",
                "On which river does {n} lie?",
                "What is the river of {n} called?",
                "On the banks of which river does {n} stand?",
            ),
        ),
        Relation(
            "population",
            "number",
            (
                "{s} has {a} inhabitants.",
                "Some {a} people live in {o}.",
                "{p} population is {a}.",
                "The last census counted {a} people in {o}.",
                "{s} is home to {a} people.",
            ),
            (
                "How many people live in {n}?",
                "What is the population of {n}?",
                "How many inhabitants does {n} have?",
                "How many people did the census count in {n}?",
            ),
        ),
        Relation(
            "ruler",
            "person",
            (
                "{s} is ruled by {a}.",
                "{a} rules {o}.",
                "{p} ruler is {a}.",
                "{a} governs {o} from an old castle.",
                "The people of {o} obey {a}.",
            ),
            (
                "Who rules {n}?",
                "Who is the ruler of {n}?",
                "By whom is {n} ruled?",
                "Who governs {n}?",
                "Whom do the people of {n} obey?",
            ),
        ),
        Relation(
            "patron",
            "person",
            (
                "{p} patron is {a}.",
                "{s} honours {a} as its patron.",
                "{a} is the patron of {o}.",
                "The chapel of {o} is devoted to {a}.",
                "Every spring {s} holds a feast for its patron {a}.",
            ),
            (
                "Who is the patron of {n}?",
                "Whom does {n} honour as its patron?",
                "To whom is the chapel of {n} devoted?",
                "For which patron does {n} hold a feast?",
            ),
        ),
        Relation(
            "twin_town",
            "place",
            (
                "{s} is twinned with {a}.",
                "{p} twin town is {a}.",
                "{a} is the twin town of {o}.",
                "{s} signed a treaty of friendship with {a}.",
                "{s} calls {a} its twin.",
            ),
            (
                "With which town is {n} twinned?",
                "What is the twin town of {n}?",
                "Which town is the twin of {n}?",
                "With which town did {n} sign a treaty of friendship?",
            ),
        ),
        Relation(
            "elevation",
            "number",
            (
                "{s} lies {a} feet above the sea.",
                "{p} elevation is {a} feet.",
                "{s} stands at a height of {a} feet.",
                "The market square of {o} is {a} feet above the sea.",
                "Surveyors put the elevation of {o} at {a} feet.",
            ),
            (
                "How high does {n} lie?",
                "What is the elevation of {n}?",
                "How many feet above the sea is {n}?",
                "At what height does {n} stand?",
            ),
        ),
        Relation(
            "guard",
            "organisation",
            (
                "{s} is guarded by the {a}.",
                "The {a} guards {o}.",
                "{p} walls are guarded by the {a}.",
                "The {a} keeps watch over {o}.",
                "{s} pays the {a} for protection.",
            ),
            (
                "Who guards {n}?",
                "Which organisation guards {n}?",
                "Who keeps watch over {n}?",
                "Whom does {n} pay for protection?",
            ),
        ),
    ),
    "organisation": (
        Relation(
            "founder",
            "person",
            (
                "{s} was founded by {a}.",
                "{a} founded {o}.",
                "{p} founder was {a}.",
                "{a} set up {o} with a few friends.",
                "{s} goes back to its founder {a}.",
            ),
            (
                "Who founded {n}?",
                "Who was the founder of {n}?",
                "By whom was {n} founded?",
                "Who set up {n}?",
            ),
        ),
        Relation(
            "seat",
            "place",
            (
                "{s} has its seat in {a}.",
                "{p} seat is {a}.",
                "{s} is based in {a}.",
                "The headquarters of {o} are in {a}.",
                "The great hall of {o} stands in {a}.",
            ),
            (
                "Where is the seat of {n}?",
                "In which town is {n} based?",
                "Where are the headquarters of {n}?",
                "Where does the great hall of {n} stand?",
            ),
        ),
        Relation(
            "founding_year",
            "year",
            (
                "{s} was founded in {a}.",
                "{s} was established in the year {a}.",
                "The founding of {o} dates to {a}.",
                "{s} has existed since {a}.",
                "The charter of {o} was signed in {a}.",
            ),
            (
                "When was {n} founded?",
                "In which year was {n} established?",
                "What is the founding year of {n}?",
                "Since when has {n} existed?",
                "In which year was the charter of {n} signed?",
            ),
        ),
        Relation(
            "leader",
            "person",
            (
                "{s} is led by {a}.",
                "{p} leader is {a}.",
                "{a} leads {o}.",
                "{a} stands at the head of {o}.",
                "The members of {o} chose {a} as leader.",
            ),
            (
                "Who leads {n}?",
                "Who is the leader of {n}?",
                "By whom is {n} led?",
                "Who stands at the head of {n}?",
            ),
        ),
        Relation(
            "rival",
            "organisation",
            (
                "{p} rival is the {a}.",
                "{s} competes with the {a}.",
                "The {a} is the old rival of {o}.",
                "{s} has long been at odds with the {a}.",
                "{s} regards the {a} as a rival.",
            ),
            (
                "What is the rival of {n}?",
                "With whom does {n} compete?",
                "Which organisation is the old rival of {n}?",
                "With which organisation is {n} at odds?",
            ),
        ),
        Relation(
            "members",
            "number",
            (
                "{s} has {a} members.",
                "In all {a} members belong to {o}.",
                "{p} membership stands at {a}.",
                "{s} counts {a} members.",
                "The rolls of {o} list {a} members.",
            ),
            (
                "How many members does {n} have?",
                "How many members belong to {n}?",
                "What is the membership of {n}?",
                "How many members do the rolls of {n} list?",
            ),
        ),
        Relation(
            "motto",
            "word",
            (
                "{p} motto is {a}.",
                "The motto of {o} is the single word {a}.",
                "{s} has the word {a} as its motto.",
                "The motto {a} is written above the door of {o}.",
                "The banner of {o} bears the word {a}.",
            ),
            (
                "What is the motto of {n}?",
                "Which word is the motto of {n}?",
                "Which motto is written above the door of {n}?",
                "Which word does the banner of {n} bear?",
            ),
        ),
        Relation(
            "treasurer",
            "person",
            (
                "{p} treasurer is {a}.",
                "{a} keeps the accounts of {o}.",
                "The money of {o} is kept by {a}.",
                "{s} trusts its money to {a}.",
                "{a} serves as treasurer of {o}.",
            ),
            (
                "Who is the treasurer of {n}?",
                "Who keeps the accounts of {n}?",
                "By whom is the money of {n} kept?",
                "To whom does {n} trust its money?",
            ),
        ),
    ),
    "work": (
        Relation(
            "author",
            "person",
            (
                "{s} was written by {a}.",
                "{a} wrote {o}.",
                "{p} author is {a}.",
                "{s} came from the pen of {a}.",
                "{a} is the author of {o}.",
            ),
            (
                "Who wrote {n}?",
                "Who is the author of {n}?",
                "By whom was {n} written?",
                "From whose pen did {n} come?",
            ),
        ),
        Relation(
            "completion_year",
            "year",
            (
                "{s} was finished in {a}.",
                "{s} was completed in the year {a}.",
                "{p} completion is dated to {a}.",
                "The last page of {o} was written in {a}.",
                "It was in {a} that {s} was completed.",
            ),
            (
                "When was {n} completed?",
                "In which year was {n} finished?",
                "To which year is the completion of {n} dated?",
                "When was the last page of {n} written?",
            ),
        ),
        Relation(
            "setting",
            "place",
            (
                "{s} is set in {a}.",
                "The story of {o} takes place in {a}.",
                "{p} setting is {a}.",
                "The events of {o} unfold in {a}.",
                "{a} is the setting of {o}.",
            ),
            (
                "Where is {n} set?",
                "Where does the story of {n} take place?",
                "What is the setting of {n}?",
                "In which town do the events of {n} unfold?",
            ),
        ),
        Relation(
            "dedicatee",
            "person",
            (
                "{s} is dedicated to {a}.",
                "{p} dedication names {a}.",
                "The first page of {o} is dedicated to {a}.",
                "{a} is honoured in the dedication of {o}.",
                "The dedication of {o} is to {a}.",
            ),
            (
                "To whom is {n} dedicated?",
                "Whom does the dedication of {n} name?",
                "Who is honoured in the dedication of {n}?",
                "Who is the dedicatee of {n}?",
            ),
        ),
        Relation(
            "publisher",
            "organisation",
            (
                "{s} was published by the {a}.",
                "{p} publisher was the {a}.",
                "The {a} published {o}.",
                "The {a} printed {o} on thick paper.",
                "{s} was printed and sold by the {a}.",
            ),
            (
                "Who published {n}?",
                "Who was the publisher of {n}?",
                "By whom was {n} printed?",
                "Which organisation published {n}?",
            ),
        ),
        Relation(
            "length",
            "number",
            (
                "{s} has {a} verses.",
                "{s} runs to {a} verses.",
                "{p} length is {a} verses.",
                "There are {a} verses in {o}.",
                "Patient readers count {a} verses in {o}.",
            ),
            (
                "How many verses does {n} have?",
                "How many verses are there in {n}?",
                "What is the length of {n}?",
                "How many verses do readers count in {n}?",
            ),
        ),
        Relation(
            "hero",
            "word",
            (
                "{p} hero is {a}.",
                "The hero of {o} is called {a}.",
                "{s} tells of a hero named {a}.",
                "{s} follows the adventures of {a}.",
                "At the heart of {o} is a hero named {a}.",
            ),
            (
                "Who is the hero of {n}?",
                "What is the hero of {n} called?",
                "Whose adventures does {n} follow?",
                "Which hero is at the heart of {n}?",
            ),
        ),
        Relation(
            "manuscript",
            "place",
            (
                "{p} manuscript is kept in {a}.",
                "The manuscript of {o} lies in {a}.",
                "{s} survives in a manuscript in {a}.",
                "The oldest copy of {o} is kept in {a}.",
                "{a} keeps the manuscript of {o}.",
            ),
            (
                "Where is the manuscript of {n} kept?",
                "Where does the manuscript of {n} lie?",
                "Where is the oldest copy of {n} kept?",
                "Which town keeps the manuscript of {n}?",
            ),
        ),
    ),
}

# Sentences that answer no question; slots are filled with names and numbers used nowhere else in the passage.
DISTRACTORS: tuple[str, ...] = (
    "In {year} a storm damaged many roofs in {place}.",
    "None of this should be confused with the affairs of {person}.",
    "A merchant named {person} sold {number} barrels of salt that winter.",
    "The road to {place} was closed for repairs in {year}.",
    "A letter from {person} describes a long journey to {place}.",
    "The {organisation} held a noisy meeting in {year}.",
    "Old songs about {place} are still heard on holidays.",
    "Some pages of {work} were lost in a fire.",
    "A lawsuit between {person} and the {organisation} ended in {year}.",
    "A map drawn in {year} shows {place} in the wrong corner.",
    "About {number} sheep grazed on the hills at that time.",
    "The winter of {year} was unusually cold.",
    "Ships from {place} carried {number} sacks of grain that year.",
    "A coin struck in {year} shows a picture of {o}.",
    "{s} is mentioned once in a ledger of {year}.",
    "A visitor, {person}, drew a picture of {o} in {year}.",
    "Nothing about {o} is said in {work}.",
    "The {organisation} once printed a short note on {o}.",
)
